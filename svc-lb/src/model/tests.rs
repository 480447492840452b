//! Ownership, completeness and indexes.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{
    Batch, Change, Edit, Hints, Intake, Kind, Model, Node, Object, ObjectKey, ObjectName, SourceId,
    build::{endpoint, named, object, service, slice},
};

const A: SourceId = SourceId(0);
const B: SourceId = SourceId(1);

fn key(kind: Kind, name: &str) -> ObjectKey {
    ObjectKey {
        kind,
        name: named(name),
    }
}

fn upsert(name: &str) -> Change {
    Change::Upsert(object(service(name, &["10.96.0.1"])))
}

fn delete(name: &str) -> Change {
    Change::Delete(key(Kind::Service, name))
}

fn send(intake: &mut Intake, source: SourceId, changes: impl Into<Vec<Change>>) -> Vec<String> {
    let edits = intake.apply(Batch {
        source,
        changes: changes.into(),
    });
    edits
        .iter()
        .map(|edit| match edit {
            Edit::Upsert(object) => format!("+{}", object.key().name.name),
            Edit::Delete(key) => format!("-{}", key.name.name),
        })
        .collect()
}

/// SEMANTICS G8: nothing passes before every source has completed its first list.
#[test]
fn first_lists_are_held_until_all_are_complete() {
    let mut intake = Intake::new([A, B]);
    assert_eq!(
        send(&mut intake, A, [upsert("one"), Change::InitialListComplete]),
        [""; 0]
    );
    assert_eq!(send(&mut intake, A, [upsert("two")]), [""; 0]);
    assert_eq!(intake.incomplete(), [B]);
    assert!(!intake.started());
    let edits = send(
        &mut intake,
        B,
        [upsert("three"), Change::InitialListComplete],
    );
    assert_eq!(edits, ["+one", "+two", "+three"]);
    assert!(intake.started());
    assert_eq!(send(&mut intake, A, [delete("one")]), ["-one"]);
}

/// A resync that comes before the start begins that source's list anew.
#[test]
fn a_resync_before_the_start_discards_what_was_held() {
    let mut intake = Intake::new([A, B]);
    send(&mut intake, A, [upsert("old"), Change::InitialListComplete]);
    send(&mut intake, A, [Change::Resync, upsert("new")]);
    assert_eq!(send(&mut intake, B, [Change::InitialListComplete]), [""; 0]);
    assert_eq!(
        send(&mut intake, A, [Change::InitialListComplete]),
        ["+new"]
    );
}

/// SEMANTICS G8: a later list removes what it did not name, at its end and not before.
#[test]
fn a_resync_takes_effect_as_a_whole_at_its_end() {
    let mut intake = Intake::new([A]);
    send(
        &mut intake,
        A,
        [upsert("one"), upsert("two"), Change::InitialListComplete],
    );
    assert_eq!(
        send(&mut intake, A, [Change::Resync, upsert("three")]),
        [""; 0]
    );
    assert_eq!(
        send(&mut intake, A, [delete("two"), upsert("two")]),
        [""; 0]
    );
    assert_eq!(
        send(&mut intake, A, [Change::InitialListComplete]),
        ["+three", "+two", "-one"]
    );
}

/// A list of one kind replaces that kind and no other, at once.
#[test]
fn a_list_replaces_its_kind_only() {
    let list = |names: &[&str]| {
        let service = |name: &&str| object(service(name, &["10.96.0.1"]));
        let objects = names.iter().map(service).collect();
        Change::Replace {
            kind: Kind::Service,
            objects,
            unreadable: vec![],
        }
    };
    let other = Change::Upsert(Object::EndpointSlice(slice("x", "one", vec![])));
    let mut intake = Intake::new([A]);
    let held = [other, list(&["one", "two"]), list(&["two", "three"])];
    assert_eq!(send(&mut intake, A, held), [""; 0]);
    assert_eq!(
        send(&mut intake, A, [Change::InitialListComplete]),
        ["+three", "+two", "+x"]
    );
    assert_eq!(
        send(&mut intake, A, [list(&["three", "four"])]),
        ["+four", "+three", "-two"]
    );
    assert_eq!(send(&mut intake, A, [list(&[])]), ["-four", "-three"]);
}

/// SEMANTICS G8: what a list names but cannot be read is not removed by it.
#[test]
fn what_cannot_be_read_stays() {
    let mut intake = Intake::new([A]);
    send(
        &mut intake,
        A,
        [upsert("one"), upsert("two"), Change::InitialListComplete],
    );
    let unreadable = key(Kind::Service, "one");
    assert_eq!(
        send(&mut intake, A, [Change::Unreadable(unreadable.clone())]),
        [""; 0]
    );
    let list = [
        Change::Resync,
        Change::Unreadable(unreadable.clone()),
        Change::InitialListComplete,
    ];
    assert_eq!(send(&mut intake, A, list), ["-two"]);
    let replace = Change::Replace {
        kind: Kind::Service,
        objects: vec![],
        unreadable: vec![unreadable],
    };
    assert_eq!(send(&mut intake, A, [replace]), [""; 0]);
    assert_eq!(send(&mut intake, A, [delete("one")]), ["-one"]);
}

/// A source removes only what it owns; who named an object last owns it.
#[test]
fn the_last_to_name_an_object_owns_it() {
    let mut intake = Intake::new([A, B]);
    send(&mut intake, A, [upsert("x"), Change::InitialListComplete]);
    assert_eq!(send(&mut intake, B, [Change::InitialListComplete]), ["+x"]);
    assert_eq!(send(&mut intake, B, [delete("x")]), [""; 0]);
    assert_eq!(send(&mut intake, B, [upsert("x")]), ["+x"]);
    assert_eq!(send(&mut intake, A, [delete("x")]), [""; 0]);
    assert_eq!(
        send(
            &mut intake,
            A,
            [Change::Resync, Change::InitialListComplete]
        ),
        [""; 0]
    );
    assert_eq!(send(&mut intake, B, [delete("x")]), ["-x"]);
}

/// One endpoint's change concerns its Service and no other.
#[test]
fn a_slice_concerns_its_service_only() {
    let mut model = Model::new("node-a");
    let mut edits: Vec<Edit> = (0..10)
        .map(|i| Edit::Upsert(object(service(&format!("s{i}"), &["10.96.0.1"]))))
        .collect();
    edits.push(Edit::Upsert(Object::EndpointSlice(slice(
        "s3-x",
        "s3",
        vec![],
    ))));
    assert_eq!(model.apply(edits).len(), 10);

    let changed = slice("s3-x", "s3", vec![endpoint("10.244.1.1", "node-a")]);
    let edit = Edit::Upsert(Object::EndpointSlice(changed));
    assert_eq!(model.apply([edit.clone()]), BTreeSet::from([named("s3")]));
    assert_eq!(model.apply([edit]), BTreeSet::new(), "nothing changed");
}

/// A slice that changes its Service concerns both; a slice may come before its Service.
#[test]
fn a_slice_may_change_hands() {
    let mut model = Model::new("node-a");
    let first = Edit::Upsert(Object::EndpointSlice(slice("x", "one", vec![])));
    let second = Edit::Upsert(Object::EndpointSlice(slice("x", "two", vec![])));
    assert_eq!(model.apply([first]), BTreeSet::from([named("one")]));
    assert_eq!(
        model.apply([second]),
        BTreeSet::from([named("one"), named("two")])
    );
    assert_eq!(model.slices(&named("one")).count(), 0);
    assert_eq!(model.slices(&named("two")).count(), 1);
    let gone = Edit::Delete(key(Kind::EndpointSlice, "x"));
    assert_eq!(model.apply([gone]), BTreeSet::from([named("two")]));
    assert_eq!(model.slices(&named("two")).count(), 0);
}

/// SEMANTICS A7: a slice that names no Service belongs to none.
#[test]
fn a_slice_without_service_concerns_nobody() {
    let mut model = Model::new("node-a");
    let mut orphan = slice("x", "one", vec![]);
    orphan.service = None;
    assert_eq!(
        model.apply([Edit::Upsert(Object::EndpointSlice(orphan))]),
        BTreeSet::new()
    );
}

/// SEMANTICS D8: a new zone label concerns the Services with hints, and only on this node.
#[test]
fn a_zone_concerns_services_with_hints() {
    let mut model = Model::new("node-a");
    let mut hinted = endpoint("10.244.1.1", "node-a");
    hinted.hints = Some(Box::new(Hints {
        nodes: vec![],
        zones: vec!["z1".into()],
    }));
    model.apply([
        Edit::Upsert(Object::EndpointSlice(slice("h-x", "hinted", vec![hinted]))),
        Edit::Upsert(Object::EndpointSlice(slice("p-x", "plain", vec![]))),
    ]);
    let node = |name: &str, zone: &str| {
        Edit::Upsert(Object::Node(Node {
            name: name.into(),
            zone: Some(zone.into()),
            leaves: false,
            addresses: [super::build::ip("192.0.2.1")].into(),
        }))
    };
    assert_eq!(model.apply([node("node-b", "z1")]), BTreeSet::new());
    assert_eq!(
        model.apply([node("node-a", "z1")]),
        BTreeSet::from([named("hinted")])
    );
    assert_eq!(model.node().zone.as_deref(), Some("z1"));
    assert_eq!(model.node_object_addresses().len(), 1);
    assert_eq!(model.apply([node("node-a", "z1")]), BTreeSet::new());
    let name = ObjectName::new("", "node-a");
    let gone = Edit::Delete(ObjectKey {
        kind: Kind::Node,
        name,
    });
    assert_eq!(model.apply([gone]), BTreeSet::from([named("hinted")]));
    assert_eq!(model.node().zone, None);
    assert!(model.node_object_addresses().is_empty());
}

#[derive(Clone, Debug)]
enum Step {
    Upsert(u8),
    Delete(u8),
    Resync,
    Complete,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => (0..6u8).prop_map(Step::Upsert),
        3 => (0..6u8).prop_map(Step::Delete),
        1 => Just(Step::Resync),
        2 => Just(Step::Complete),
    ]
}

proptest! {
    /// SEMANTICS G8: with one source, what passed is always exactly its last complete list with
    /// the changes since.
    #[test]
    fn what_passes_is_the_last_complete_list(steps in prop::collection::vec(step(), 0..60)) {
        let mut intake = Intake::new([A]);
        let mut passed = BTreeSet::new();
        let mut complete: Option<BTreeSet<u8>> = None;
        let mut listing = Some(BTreeSet::new());
        for step in steps {
            let change = match step {
                Step::Upsert(n) => {
                    if let Some(set) = listing.as_mut().or(complete.as_mut()) { set.insert(n); }
                    upsert(&n.to_string())
                }
                Step::Delete(n) => {
                    if let Some(set) = listing.as_mut().or(complete.as_mut()) { set.remove(&n); }
                    delete(&n.to_string())
                }
                Step::Resync => {
                    listing = Some(BTreeSet::new());
                    Change::Resync
                }
                Step::Complete => {
                    if let Some(list) = listing.take() { complete = Some(list); }
                    Change::InitialListComplete
                }
            };
            for edit in intake.apply(Batch { source: A, changes: vec![change] }) {
                match edit {
                    Edit::Upsert(object) => passed.insert(object.key().name.name),
                    Edit::Delete(key) => passed.remove(&key.name.name),
                };
            }
            let expected: BTreeSet<String> =
                complete.iter().flatten().map(u8::to_string).collect();
            prop_assert_eq!(&passed, &expected);
        }
    }

    /// The index by Service always equals a search of all slices.
    #[test]
    fn the_index_equals_a_search(
        moves in prop::collection::vec((0..5u8, prop::option::of(0..3u8)), 0..40),
    ) {
        let mut model = Model::new("node-a");
        let mut slices = BTreeMap::new();
        for (name, owner) in moves {
            let name = format!("slice-{name}");
            let edit = if let Some(owner) = owner {
                let owner = format!("s{owner}");
                slices.insert(name.clone(), owner.clone());
                Edit::Upsert(Object::EndpointSlice(slice(&name, &owner, vec![])))
            } else {
                slices.remove(&name);
                Edit::Delete(key(Kind::EndpointSlice, &name))
            };
            model.apply([edit]);
            for owner in 0..3 {
                let owner = format!("s{owner}");
                let indexed: Vec<&str> =
                    model.slices(&named(&owner)).map(|s| s.name.name.as_str()).collect();
                let searched: Vec<&str> =
                    slices.iter().filter(|(_, o)| **o == owner).map(|(s, _)| s.as_str()).collect();
                prop_assert_eq!(indexed, searched);
            }
        }
    }
}
