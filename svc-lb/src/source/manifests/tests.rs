//! Files as people write and edit them.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch as channel},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Files, Manifests, parse::parse};
use crate::{
    model::{Batch, Change, Kind, Object, ObjectKey, SourceId},
    source::{Health, Severity},
};

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec:\n  ports:\n    - port: {port}\n"
    )
}

/// Changes as `+Service default/web:80`, `-Service default/web`, `complete`.
fn said(changes: &[Change]) -> Vec<String> {
    changes
        .iter()
        .map(|change| match change {
            Change::Upsert(Object::Service(s)) => format!("+{}:{}", s.name, s.ports[0].port),
            Change::Upsert(object) => format!("+{}", object.key()),
            Change::Delete(key) => format!("-{}", key.name),
            Change::InitialListComplete => "complete".to_owned(),
            Change::Resync => "resync".to_owned(),
            Change::Replace { kind, .. } => format!("={kind}"),
            Change::Unreadable(key) => format!("?{}", key.name),
            Change::Triggered(_) => "triggered".to_owned(),
        })
        .collect()
}

fn scan(files: &mut Files) -> Vec<String> {
    said(&files.scan(&BTreeSet::new()))
}

fn problems(files: &Files) -> Vec<String> {
    files
        .problems()
        .map(|p| format!("{:?} {p}", p.severity))
        .collect()
}

fn directory() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn write(dir: &Path, name: &str, text: &str) {
    fs::write(dir.join(name), text).expect("written");
}

fn errors(text: &str) -> Vec<String> {
    let parsed = parse(Path::new("web.yaml"), text.as_bytes());
    parsed
        .problems
        .iter()
        .map(|p| format!("{:?} {p}", p.severity))
        .collect()
}

/// Each mistake is named with file, line and field.
#[test]
fn mistakes_are_named_with_line_and_field() {
    let spec = |spec: &str| {
        format!("apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n{spec}")
    };
    let cases: &[(&str, &[&str])] = &[
        (
            &spec("  ports:\n    - prot: 80\n"),
            &[
                "Error web.yaml:7: Service web: spec.ports[0].port: required: a number from 1 to 65535",
                "Warning web.yaml:7: Service web: spec.ports[0].prot: unknown field, ignored; did you mean port?",
            ],
        ),
        (
            &spec("  ports:\n    - name: http\n      port: eighty\n"),
            &[
                "Error web.yaml:8: Service web: spec.ports[0].port: invalid type: string \"eighty\", expected i32",
            ],
        ),
        (
            &spec("  ports:\n    - port: 80\n      targetPort: \"8080\"\n"),
            &[
                "Error web.yaml:8: Service web: spec.ports[0].targetPort: \"8080\" is text: write the number without quotes",
            ],
        ),
        (
            &spec("  ports:\n    - port: 80\n    - port: 81\n"),
            &[
                "Error web.yaml:7: Service web: spec.ports[0].name: required where there is more than one port",
            ],
        ),
        (
            &spec("  ports: 80\n"),
            &[
                "Error web.yaml:6: Service web: spec.ports: invalid type: integer `80`, expected a sequence",
            ],
        ),
        (
            &spec("  clusterIP: 10.96.0\n  ports: [{port: 80}]\n"),
            &["Error web.yaml:6: Service web: spec.clusterIP: \"10.96.0\" is not an IP address"],
        ),
        (
            &spec("  externalTrafficPolicy: local\n  ports: [{port: 80}]\n"),
            &[
                "Error web.yaml:6: Service web: spec.externalTrafficPolicy: \"local\" is not one of Cluster, Local",
            ],
        ),
        (
            &spec("  ports:\n    - port: 80\n      protocol: tcp\n"),
            &[
                "Error web.yaml:8: Service web: spec.ports[0].protocol: \"tcp\" is not one of TCP, UDP, SCTP",
            ],
        ),
        (
            &spec("  ports:\n    - port: 80\n    port: 81\n"),
            &[
                "Error web.yaml:8: while parsing a block collection, did not find expected '-' indicator at line 8, column 5",
            ],
        ),
        (
            &spec("  ports: [{port: 80}]\n  externalIPs:\n    - 192.0.2.1\n    - 127.0.0.1\n"),
            &[
                "Error web.yaml:9: Service web: spec.externalIPs[1]: 127.0.0.1 is a loopback address, which other machines cannot reach",
            ],
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(text), *expected, "{text}");
    }
}

/// A document that is not one of ours is told apart: a mistake, or none of our business.
#[test]
fn other_documents_are_told_apart() {
    let cases: &[(&str, &[&str])] = &[
        (
            "apiVersion: v1\nmetadata: {name: web}\n",
            &["Error web.yaml:1: kind: required: every document is a Kubernetes object"],
        ),
        (
            "kind: Service\n",
            &[
                "Error web.yaml:1: Service: apiVersion: required: every document is a Kubernetes object",
            ],
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {}\nspec: {ports: [{port: 80}]}\n",
            &["Error web.yaml:3: Service: metadata.name: required"],
        ),
        (
            "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n",
            &[
                "Error web.yaml:1: EndpointSlice: apiVersion: \"discovery.k8s.io/v1beta1\" is not supported, write discovery.k8s.io/v1",
            ],
        ),
        (
            "apiVersion: v1\nkind: Sevice\nmetadata: {name: web}\n",
            &["Warning web.yaml:1: Sevice web: unknown kind, ignored; did you mean Service?"],
        ),
        (
            "# app\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, namespace: shop}\n",
            &[
                "Warning web.yaml:2: Deployment shop/web: ignored: apps/v1 Deployment is not for a service proxy",
            ],
        ),
        (
            "apiVersion: serving.knative.dev/v1\nkind: Service\nmetadata: {name: web}\n",
            &[
                "Warning web.yaml:1: Service web: ignored: serving.knative.dev/v1 Service is not for a service proxy",
            ],
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(errors(text), *expected, "{text}");
    }
}

/// Several mistakes of a file are all named, over several documents.
#[test]
fn all_documents_are_looked_at() {
    let text = format!(
        "{}---\n{}---\n{}",
        service("a", 0),
        service("b", 80),
        service("c", 0).replace("port: 0", "port: 70000")
    );
    assert_eq!(
        errors(&text),
        [
            "Error web.yaml:6: Service a: spec.ports[0].port: required: a number from 1 to 65535",
            "Error web.yaml:20: Service c: spec.ports[0].port: 70000 is not from 1 to 65535",
        ]
    );
}

/// YAML, several documents, lists, JSON; what is not needed of a Pod is not tripped over.
#[test]
fn forms_of_manifests() {
    let objects = |text: &str| -> Vec<String> {
        let parsed = parse(Path::new("x"), text.as_bytes());
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        parsed.objects.iter().map(|o| o.key().to_string()).collect()
    };
    assert_eq!(objects(""), [""; 0]);
    assert_eq!(objects("# nothing\n---\n---\n"), [""; 0]);
    let two = format!("---\n{}---\n{}", service("a", 80), service("b", 80));
    assert_eq!(objects(&two), ["Service default/a", "Service default/b"]);
    // I14: what Cilium reads with --lb-state-file.
    let state = r#"{"services": [
        {"metadata": {"name": "a"}, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}}
    ], "endpoints": [
        {"kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "metadata": {"name": "a-1"}, "addressType": "IPv4",
         "endpoints": [{"addresses": ["10.0.0.1"]}]},
        {"metadata": {"name": "a-2"}, "addressType": "IPv6", "endpoints": []}
    ]}"#;
    assert_eq!(
        objects(state),
        [
            "Service default/a",
            "EndpointSlice default/a-1",
            "EndpointSlice default/a-2"
        ]
    );
    let json = r#"{"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n"}},
TAB   {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
         "metadata": {"name": "s", "namespace": "x", "labels": {"kubernetes.io/service-name": "a"}},
         "endpoints": [], "ports": null}]}"#;
    let json = &json.replace("TAB", "\t");
    assert_eq!(objects(json), ["Node n", "EndpointSlice x/s"]);
    let list = "apiVersion: v1\nkind: PodList\nmetadata: {resourceVersion: \"1\"}\nitems:\n\
                - metadata: {name: p}\n  spec:\n    containers:\n    - name: c\n      \
                resources: {limits: {cpu: 2, memory: 1.5}}\n";
    assert_eq!(objects(list), ["Pod default/p"]);
}

/// The API server would write an empty name for a slice's port without one.
#[test]
fn port_names_of_slices_are_defaulted() {
    let text = "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: s}\n\
                addressType: IPv4\nendpoints: []\nports: [{port: 80}]\n";
    let parsed = parse(Path::new("x"), text.as_bytes());
    let Some(Object::EndpointSlice(slice)) = parsed.objects.first() else {
        panic!("{parsed:?}");
    };
    assert_eq!(slice.ports[0].name.as_deref(), Some(""));
}

/// The examples that users are given parse without a word.
#[test]
fn examples_parse() {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples"));
    let mut files = Files::new(path);
    let changes = files.scan(&BTreeSet::new());
    assert_eq!(problems(&files), [""; 0]);
    let services = changes
        .iter()
        .filter(|c| matches!(c, Change::Upsert(Object::Service(_))));
    assert!(services.count() > 10);
    assert_eq!(changes.last(), Some(&Change::InitialListComplete));
}

/// A directory: its `.yaml`, `.yml` and `.json` files, not hidden ones, not what editors leave.
#[test]
fn which_files_count() {
    let dir = directory();
    let at = dir.path();
    for (i, name) in [
        "a.yaml",
        "b.yml",
        "c.json",
        ".d.yaml",
        "e.yaml~",
        "f.yaml.swp",
        "#g.yaml#",
        "h.txt",
    ]
    .iter()
    .enumerate()
    {
        write(at, name, &service(&format!("s{i}"), 80));
    }
    fs::create_dir(at.join("i.yaml")).expect("a directory");
    symlink("/nonexistent", at.join("j.yaml")).expect("a link");
    let mut files = Files::new(at.to_owned());
    assert_eq!(
        scan(&mut files),
        [
            "+default/s0:80",
            "+default/s1:80",
            "+default/s2:80",
            "complete"
        ]
    );
}

/// Only what changed is read again; what is no longer named is removed.
#[test]
fn edits_become_changes() {
    let dir = directory();
    let at = dir.path();
    write(
        at,
        "a.yaml",
        &format!("{}---\n{}", service("one", 80), service("two", 80)),
    );
    write(at, "b.yaml", &service("three", 80));
    let mut files = Files::new(at.to_owned());
    assert_eq!(
        scan(&mut files),
        [
            "+default/one:80",
            "+default/two:80",
            "+default/three:80",
            "complete"
        ]
    );
    assert_eq!(scan(&mut files), [""; 0]);
    write(at, "a.yaml", &service("one", 8081));
    assert_eq!(scan(&mut files), ["+default/one:8081", "-default/two"]);
    fs::remove_file(at.join("b.yaml")).expect("removed");
    assert_eq!(scan(&mut files), ["-default/three"]);
    write(at, "a.yaml", "");
    assert_eq!(scan(&mut files), ["-default/one"]);
}

/// A file that does not parse keeps its last good state, the others go on.
#[test]
fn a_broken_file_keeps_its_last_good_state() {
    let dir = directory();
    let at = dir.path();
    write(at, "a.yaml", &service("one", 80));
    write(at, "b.yaml", &service("two", 80));
    let mut files = Files::new(at.to_owned());
    scan(&mut files);
    write(at, "a.yaml", "apiVersion: v1\nkind: Service\nmetadata: [");
    write(at, "b.yaml", &service("two", 8081));
    assert_eq!(scan(&mut files), ["+default/two:8081"]);
    assert_eq!(
        files
            .problems()
            .filter(|p| p.severity == Severity::Error)
            .count(),
        1
    );
    write(at, "a.yaml", &service("other", 80));
    assert_eq!(scan(&mut files), ["+default/other:80", "-default/one"]);
    assert_eq!(problems(&files), [""; 0]);
}

/// SEMANTICS G8: a file that is broken from the start keeps the list incomplete.
#[test]
fn a_file_broken_from_the_start_holds_the_list() {
    let dir = directory();
    let at = dir.path();
    write(at, "a.yaml", &service("one", 80));
    write(at, "b.yaml", "kind: [");
    let mut files = Files::new(at.to_owned());
    assert_eq!(scan(&mut files), ["+default/one:80"]);
    assert!(!files.complete());
    write(at, "b.yaml", &service("two", 80));
    assert_eq!(scan(&mut files), ["+default/two:80", "complete"]);
    write(at, "c.yaml", "kind: [");
    assert_eq!(scan(&mut files), [""; 0], "a later one holds nothing");
    assert!(files.complete());
}

/// Two files that name one object: the later path stands, the other takes over when it is gone.
#[test]
fn the_later_of_two_definitions_stands() {
    let dir = directory();
    let at = dir.path();
    write(at, "a.yaml", &service("web", 80));
    write(at, "b.yaml", &service("web", 81));
    let mut files = Files::new(at.to_owned());
    assert_eq!(scan(&mut files), ["+default/web:81", "complete"]);
    let path = at.display();
    assert_eq!(
        problems(&files),
        [format!(
            "Warning {path}/a.yaml: Service default/web: also defined in {path}/b.yaml, which is used"
        )]
    );
    write(at, "a.yaml", &service("web", 8080));
    assert_eq!(scan(&mut files), [""; 0]);
    fs::remove_file(at.join("b.yaml")).expect("removed");
    assert_eq!(scan(&mut files), ["+default/web:8080"]);
    assert_eq!(problems(&files), [""; 0]);
}

/// A volume's files are links through `..data`, swapped at once.
#[test]
fn volumes_are_followed() {
    let dir = directory();
    let at = dir.path();
    let mut files = Files::new(at.to_owned());
    for (version, port, expected) in [
        ("..one", 80, vec!["+default/web:80", "complete"]),
        ("..two", 81, vec!["+default/web:81"]),
    ] {
        fs::create_dir(at.join(version)).expect("a directory");
        write(&at.join(version), "web.yaml", &service("web", port));
        symlink(version, at.join("..tmp")).expect("a link");
        fs::rename(at.join("..tmp"), at.join("..data")).expect("renamed");
        if !at.join("web.yaml").exists() {
            symlink("..data/web.yaml", at.join("web.yaml")).expect("a link");
        }
        assert_eq!(scan(&mut files), expected);
    }
}

/// A path that goes away keeps its last state.
#[test]
fn a_missing_path_keeps_its_last_state() {
    let dir = directory();
    let file = dir.path().join("web");
    fs::write(&file, service("web", 80)).expect("written");
    let mut files = Files::new(file.clone());
    assert_eq!(
        scan(&mut files),
        ["+default/web:80", "complete"],
        "any name will do"
    );
    fs::remove_file(&file).expect("removed");
    assert_eq!(scan(&mut files), [""; 0]);
    assert_eq!(problems(&files).len(), 1);
    fs::write(&file, service("web", 81)).expect("written");
    assert_eq!(scan(&mut files), ["+default/web:81"]);
}

/// A path that was never there is a mistake on the command line.
#[test]
fn a_path_that_is_not_there_is_refused() {
    let error = Manifests::open(SourceId(0), "/nonexistent/x.yaml".into()).expect_err("refused");
    assert!(
        error
            .to_string()
            .starts_with("--manifests /nonexistent/x.yaml: "),
        "{error}"
    );
}

struct Running {
    batches: mpsc::Receiver<Batch>,
    health: channel::Receiver<Health>,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

fn run(path: &Path) -> Running {
    let (sender, batches) = mpsc::channel(16);
    let (report, health) = channel::channel(Health::default());
    let cancel = CancellationToken::new();
    let source = Manifests::open(SourceId(7), path.to_owned()).expect("there");
    let task = tokio::spawn(source.run(sender, report, cancel.clone()));
    Running {
        batches,
        health,
        cancel,
        task,
    }
}

async fn next(running: &mut Running) -> Vec<String> {
    let batch = timeout(Duration::from_secs(5), running.batches.recv()).await;
    let batch = batch.expect("in time").expect("running");
    assert_eq!(batch.source, SourceId(7));
    said(&batch.changes)
}

/// Edits as editors make them (write in place, write aside and rename, many files at once) arrive
/// as one batch each, well before the poll.
#[tokio::test]
async fn edits_arrive() {
    let dir = directory();
    let at = dir.path();
    write(at, "a.yaml", &service("one", 80));
    let mut running = run(at);
    assert_eq!(next(&mut running).await, ["+default/one:80", "complete"]);
    assert!(running.health.borrow_and_update().listed);

    write(at, "a.yaml", &service("one", 81));
    assert_eq!(next(&mut running).await, ["+default/one:81"]);

    write(at, ".a.yaml.tmp", &service("one", 82));
    fs::rename(at.join(".a.yaml.tmp"), at.join("a.yaml")).expect("renamed");
    assert_eq!(next(&mut running).await, ["+default/one:82"]);

    for name in ["b", "c", "d"] {
        write(at, &format!("{name}.yaml"), &service(name, 80));
    }
    fs::remove_file(at.join("a.yaml")).expect("removed");
    // One edit, unless the machine paused in between.
    let mut changes = Vec::new();
    while changes.len() < 4 {
        changes.extend(next(&mut running).await);
    }
    changes.sort_unstable();
    assert_eq!(
        changes,
        [
            "+default/b:80",
            "+default/c:80",
            "+default/d:80",
            "-default/one"
        ]
    );

    write(at, "b.yaml", "kind: [");
    let noticed = running
        .health
        .wait_for(|health| !health.problems.is_empty());
    let noticed = timeout(Duration::from_secs(5), noticed)
        .await
        .expect("in time");
    drop(noticed.expect("running"));
    running.cancel.cancel();
    timeout(Duration::from_secs(5), running.task)
        .await
        .expect("in time")
        .expect("no panic");
    assert!(
        running.batches.recv().await.is_none(),
        "the broken file changed nothing"
    );
}

/// A single file is watched through the directory around it; its neighbours are not read.
#[tokio::test]
async fn a_single_file_is_watched() {
    let dir = directory();
    let at = dir.path();
    write(at, "a.yaml", &service("one", 80));
    let mut running = run(&at.join("a.yaml"));
    assert_eq!(next(&mut running).await, ["+default/one:80", "complete"]);
    write(at, "b.yaml", &service("two", 80));
    write(at, ".new", &service("one", 81));
    fs::rename(at.join(".new"), at.join("a.yaml")).expect("renamed");
    assert_eq!(next(&mut running).await, ["+default/one:81"]);
    running.cancel.cancel();
}

/// The key of a deleted object is that of the object.
#[test]
fn keys_of_removed_objects() {
    let dir = directory();
    write(dir.path(), "a.yaml", &service("one", 80));
    let mut files = Files::new(dir.path().to_owned());
    files.scan(&BTreeSet::new());
    fs::remove_file(dir.path().join("a.yaml")).expect("removed");
    let name = crate::model::ObjectName::new("default", "one");
    assert_eq!(
        files.scan(&BTreeSet::new()),
        [Change::Delete(ObjectKey {
            kind: Kind::Service,
            name
        })]
    );
}
