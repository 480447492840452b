//! Streams as senders send them, break them and take them up again.

use std::{
    fs,
    io::Write as _,
    os::unix::{
        fs::PermissionsExt as _,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use proptest::prelude::*;
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch as channel},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{
    Stream, Target,
    decode::{Decoder, Output},
    split::{Piece, Splitter},
};
use crate::{
    model::{Batch, Change, SourceId},
    source::Health,
};

fn service(name: &str) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Service","metadata":{{"name":"{name}","namespace":"x"}},"spec":{{"clusterIP":"10.96.0.1","ports":[{{"port":80}}]}}}}"#
    )
}

fn slice(name: &str) -> String {
    format!(
        r#"{{"apiVersion":"discovery.k8s.io/v1","kind":"EndpointSlice","metadata":{{"name":"{name}","namespace":"x"}},"addressType":"IPv4","endpoints":[]}}"#
    )
}

fn event(kind: &str, object: &str) -> String {
    format!(r#"{{"type":"{kind}","object":{object}}}"#)
}

fn end_of(kind: &str, version: &str) -> String {
    event(
        "BOOKMARK",
        &format!(
            r#"{{"kind":"{kind}","apiVersion":"{version}","metadata":{{"resourceVersion":"7","annotations":{{"k8s.io/initial-events-end":"true"}}}}}}"#
        ),
    )
}

fn end() -> String {
    end_of("Service", "v1")
}

/// Changes as `+web`, `-web`, `=Service web`, `resync`, `complete`, `?web`.
fn said(changes: &[Change]) -> Vec<String> {
    let one = |change: &Change| match change {
        Change::Upsert(object) => format!("+{}", object.key().name.name),
        Change::Delete(key) => format!("-{}", key.name.name),
        Change::Replace {
            kind,
            objects,
            unreadable,
        } => {
            let names = objects.iter().map(|object| object.key().name.name);
            let unread = unreadable.iter().map(|key| format!("?{}", key.name.name));
            let all: Vec<String> = names.chain(unread).collect();
            format!("={kind} {}", all.join(" "))
        }
        Change::Unreadable(key) => format!("?{}", key.name.name),
        Change::InitialListComplete => "complete".to_owned(),
        Change::Resync => "resync".to_owned(),
        Change::Triggered(time) => format!("at {}", jiff::Timestamp::try_from(*time).unwrap()),
    };
    changes.iter().map(one).collect()
}

fn split(splitter: &mut Splitter, text: &str) -> Vec<String> {
    splitter.feed(text.as_bytes());
    std::iter::from_fn(|| splitter.next_piece())
        .map(piece)
        .collect()
}

fn piece(piece: Piece) -> String {
    match piece {
        Piece::Value { offset, text } => {
            format!("{offset} {}", String::from_utf8(text).expect("text"))
        }
        Piece::Malformed { offset, problem } => format!("{offset} ! {problem}"),
    }
}

/// Values with anything or nothing between them; each mistake with its position, and the next
/// value found again.
#[test]
fn values_are_found_and_mistakes_placed() {
    let cases: &[(&str, &[&str])] = &[
        ("", &[]),
        (" \n\t", &[]),
        ("{}{}", &["0 {}", "2 {}"]),
        (
            "\n{\"a\":[1,-2.5e+3,\"}\"]}\r\n {}",
            &["1 {\"a\":[1,-2.5e+3,\"}\"]}", "25 {}"],
        ),
        (
            r#"{"a\"\\\u00e9":{"b":[true,false,null,{},[]]}}"#,
            &[r#"0 {"a\"\\\u00e9":{"b":[true,false,null,{},[]]}}"#],
        ),
        ("xx yy {}", &["0 ! expected a JSON object", "6 {}"]),
        ("{}, {}", &["0 {}", "2 ! expected a JSON object", "4 {}"]),
        (
            "{\"a\":1 {}",
            &["7 ! expected ',' or a closing bracket", "7 {}"],
        ),
        (
            "{\"a\":nope}{}",
            &["6 ! expected true, false or null", "10 {}"],
        ),
        ("{\"a\":?}{}", &["5 ! expected a value", "7 {}"]),
        ("{\"a\" 1}{}", &["5 ! expected ':'", "7 {}"]),
        ("{a:1}{}", &["1 ! expected a key in quotes", "5 {}"]),
        ("{\"a\":[1}{}", &["7 ! brackets do not match", "8 {}"]),
        (
            "{\"a\":\"x\n\"}{}",
            &["7 ! control character in a string", "10 {}"],
        ),
        ("{\"a\":\"\\x\"}{}", &["7 ! unknown escape", "10 {}"]),
        (
            "{\"a\":\"\\u12g4\"}{}",
            &["10 ! expected a hexadecimal digit", "14 {}"],
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(
            split(&mut Splitter::new(1 << 10), text),
            *expected,
            "{text}"
        );
    }
    let deep = format!("{}{}", "{\"a\":".repeat(200), "{}");
    let found = split(&mut Splitter::new(1 << 20), &deep);
    assert!(found[0].ends_with("! nested too deeply"), "{found:?}");
}

/// A value that is too long is said once, skipped to its end, and not kept.
#[test]
fn values_that_are_too_long() {
    let mut splitter = Splitter::new(100);
    assert_eq!(split(&mut splitter, "{}{\"a\":\""), ["0 {}"]);
    let mut found = Vec::new();
    for _ in 0..1000 {
        found.extend(split(&mut splitter, &"{".repeat(50)));
    }
    assert_eq!(found, ["2 ! the object is too long"]);
    assert_eq!(
        split(&mut splitter, "\"}{}"),
        [format!("{} {{}}", 2 + 6 + 50_000 + 2)]
    );
}

/// What the end of a stream cuts off is said; positions begin anew.
#[test]
fn the_end_of_a_stream() {
    let mut splitter = Splitter::new(100);
    assert_eq!(split(&mut splitter, "{} {\"a\""), ["0 {}"]);
    let cut = splitter.end().map(piece);
    assert_eq!(
        cut.as_deref(),
        Some("7 ! the stream ended inside an object")
    );
    assert_eq!(split(&mut splitter, "{}"), ["0 {}"]);
    assert_eq!(splitter.end(), None);
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(Into::into),
        any::<i64>().prop_map(Into::into),
        (-1e6..1e6f64).prop_map(Into::into),
        "[a-z\"\\\\{}\\[\\],:\n\u{e9}]{0,8}".prop_map(Into::into),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
            prop::collection::btree_map("[a-z\"{}]{0,4}", inner, 0..4)
                .prop_map(|map| { serde_json::Value::Object(map.into_iter().collect()) }),
        ]
    })
}

fn any_object() -> impl Strategy<Value = String> {
    (
        prop::collection::btree_map("[a-z]{0,4}", any_json(), 0..4),
        any::<bool>(),
    )
        .prop_map(|(map, pretty)| {
            let value = serde_json::Value::Object(map.into_iter().collect());
            if pretty {
                format!("{value:#}")
            } else {
                value.to_string()
            }
        })
}

proptest! {
    /// Any objects, anything that may stand between them, in any chunks: exactly the objects.
    #[test]
    fn splitting_finds_exactly_the_objects(
        objects in prop::collection::vec((any_object(), "[ \n\r\t]{0,3}"), 0..6),
        chunk in 1..40usize,
    ) {
        let mut text = String::new();
        let mut expected = Vec::new();
        for (object, gap) in &objects {
            expected.push(format!("{} {object}", text.len()));
            text.push_str(object);
            text.push_str(gap);
        }
        let mut splitter = Splitter::new(1 << 20);
        let mut found = Vec::new();
        for bytes in text.as_bytes().chunks(chunk) {
            splitter.feed(bytes);
            found.extend(std::iter::from_fn(|| splitter.next_piece()).map(piece));
        }
        prop_assert_eq!(found, expected);
        prop_assert_eq!(splitter.end(), None);
    }

    /// A value cut anywhere costs at most the one that follows it.
    #[test]
    fn a_cut_value_costs_at_most_its_neighbour(object in any_object(), cut in any::<prop::sample::Index>()) {
        let boundaries: Vec<usize> = object.char_indices().map(|(i, _)| i).collect();
        let cut = *cut.get(&boundaries);
        let text = format!("{}\n{{\"one\":1}}\n{{\"two\":2}}\n", &object[..cut]);
        let found = split(&mut Splitter::new(1 << 20), &text);
        let last = found.last().cloned().unwrap_or_default();
        prop_assert!(last.ends_with("{\"two\":2}"), "{:?}", found);
        let whole = found.iter().filter(|piece| piece.ends_with("{\"one\":1}")).count();
        prop_assert!(whole == 1 || found.iter().any(|piece| piece.contains(" ! ")), "{:?}", found);
    }

    /// Whatever comes: values are where they are said to be, and mistakes are within the stream.
    #[test]
    fn anything_is_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), chunk in 1..50usize) {
        let mut splitter = Splitter::new(64);
        for part in bytes.chunks(chunk) {
            splitter.feed(part);
            while let Some(piece) = splitter.next_piece() {
                match piece {
                    Piece::Value { offset, text } => {
                        let at = usize::try_from(offset).expect("small");
                        prop_assert_eq!(&bytes[at..at + text.len()], &*text);
                    }
                    Piece::Malformed { offset, .. } => prop_assert!(offset < bytes.len() as u64),
                }
            }
        }
    }
}

fn decode(texts: &[String]) -> (Vec<String>, Vec<String>) {
    let mut decoder = Decoder::new();
    let mut output = Output::default();
    for text in texts {
        decoder.value(text.as_bytes(), &mut output);
    }
    let unusable = output.unusable.iter().map(|u| {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        format!("{}|{}|{}", part(&u.object), part(&u.field), u.message)
    });
    (said(&output.changes), unusable.collect())
}

/// What the API server sends for a watch with initial events.
#[test]
fn a_watch() {
    let bookmark = event(
        "BOOKMARK",
        r#"{"kind":"Service","apiVersion":"v1","metadata":{"resourceVersion":"9"}}"#,
    );
    let (changes, unusable) = decode(&[
        event("ADDED", &service("a")),
        event("ADDED", &service("b")),
        bookmark,
        end(),
        event("MODIFIED", &service("a")),
        event("DELETED", &service("b")),
        end(),
    ]);
    assert_eq!(changes, ["+a", "+b", "complete", "+a", "-b"]);
    assert_eq!(unusable, [""; 0]);
}

/// Two watches in one stream: the list ends when the bookmarks of both have come.
#[test]
fn two_watches_in_one_stream() {
    let slices_end = end_of("EndpointSlice", "discovery.k8s.io/v1");
    let both = [event("ADDED", &service("a")), event("ADDED", &slice("a-1"))];
    let [one, two] = both;
    let (changes, _) = decode(&[one.clone(), two.clone(), end(), slices_end.clone()]);
    assert_eq!(changes, ["+a", "+a-1", "complete"]);
    let (changes, _) = decode(&[one.clone(), two.clone(), slices_end]);
    assert_eq!(changes, ["+a", "+a-1"]);
    let kindless = event(
        "BOOKMARK",
        r#"{"metadata":{"annotations":{"k8s.io/initial-events-end":"true"}}}"#,
    );
    assert_eq!(decode(&[one, two, kindless]).0, ["+a", "+a-1", "complete"]);
    assert_eq!(decode(&[end()]).0, ["complete"], "an empty list");
}

/// A List is all objects of its kind, at the start and later; items may leave out their kind.
#[test]
fn lists() {
    let bare = service("a").replace(r#""apiVersion":"v1","kind":"Service","#, "");
    let list = |items: &str| {
        format!(
            r#"{{"kind":"ServiceList","apiVersion":"v1","metadata":{{"resourceVersion":"1"}},"items":[{items}]}}"#
        )
    };
    let (changes, unusable) = decode(&[
        list(&format!("{bare},{}", service("b"))),
        list(""),
        format!(
            r#"{{"kind":"List","apiVersion":"v1","items":[{},{}]}}"#,
            slice("s"),
            service("c")
        ),
    ]);
    assert_eq!(
        changes,
        [
            "=Service a b",
            "complete",
            "=Service ",
            "=Service c",
            "=EndpointSlice s"
        ]
    );
    assert_eq!(unusable, [""; 0]);
    let (changes, _) = decode(&[event("ADDED", &slice("s")), list(&bare)]);
    assert_eq!(
        changes,
        ["+s", "=Service a"],
        "slices were begun and are not closed"
    );
}

/// ERROR 410 begins a new list; other errors are said.
#[test]
fn errors_of_the_sender() {
    let status = |code: u32, message: &str| {
        event(
            "ERROR",
            &format!(
                r#"{{"kind":"Status","apiVersion":"v1","metadata":{{}},"status":"Failure","message":"{message}","code":{code}}}"#
            ),
        )
    };
    let (changes, unusable) = decode(&[
        end(),
        status(410, "too old resource version"),
        event("ADDED", &service("a")),
        status(500, "etcd is away"),
        end(),
    ]);
    assert_eq!(changes, ["complete", "resync", "+a", "complete"]);
    assert_eq!(unusable, ["||the sender reports error 500: etcd is away"]);
}

/// Each value that says nothing usable is named with object and field; what a list named but
/// could not be read stays.
#[test]
fn unusable_values() {
    let cases = [
        (
            r#"{"a": 1}"#.to_owned(),
            "||neither a watch event nor a List",
        ),
        (
            service("a"),
            "||Service is neither a watch event nor a List of ours",
        ),
        (
            r#"{"type":"ADDED"}"#.to_owned(),
            "||event ADDED without object",
        ),
        (
            event("CHANGED", "{}"),
            "||\"CHANGED\" is not an event: ADDED, MODIFIED, DELETED, BOOKMARK or ERROR",
        ),
        (
            event("ADDED", &service("a").replace("80", "\"80\"")),
            "Service x/a|spec.ports[0].port|invalid type: string \"80\", expected i32 at line 1 column 129",
        ),
        (
            event("ADDED", &service("a").replace("80", "0")),
            "Service x/a|spec.ports[0].port|required: a number from 1 to 65535",
        ),
        (
            event("ADDED", &slice("a").replace("/v1", "/v1beta1")),
            "EndpointSlice x/a|apiVersion|not supported, send discovery.k8s.io/v1",
        ),
        (
            event("DELETED", r#"{"kind":"Service","apiVersion":"v1"}"#),
            "Service|metadata.name|required",
        ),
    ];
    for (text, expected) in cases {
        let (changes, unusable) = decode(std::slice::from_ref(&text));
        assert_eq!(unusable, [expected], "{text}");
        let read = changes
            .iter()
            .any(|change| change.starts_with(['+', '-', '=']));
        assert!(!read, "{changes:?}");
    }
    let broken = service("b").replace("80", "0");
    assert_eq!(decode(&[event("ADDED", &broken)]).0, ["?b"]);
    let list = format!(
        r#"{{"kind":"ServiceList","apiVersion":"v1","items":[{},{broken}]}}"#,
        service("a")
    );
    assert_eq!(decode(&[list]).0, ["=Service a ?b", "complete"]);
}

/// Objects that are not for a proxy are said once per kind, and cost nothing else.
#[test]
fn foreign_objects() {
    let object = |kind: &str| {
        event(
            "ADDED",
            &format!(r#"{{"kind":"{kind}","apiVersion":"apps/v1","metadata":{{"name":"a"}}}}"#),
        )
    };
    let (changes, unusable) = decode(&[object("Deployment"), object("Deployment"), object("Job")]);
    assert_eq!(changes, [""; 0]);
    assert_eq!(
        unusable,
        [
            "||Deployment is not for a service proxy, ignored from here on",
            "||Job is not for a service proxy, ignored from here on"
        ]
    );
}

#[test]
fn targets() {
    for (text, target) in [
        ("-", Target::Stdin),
        ("unix:/run/x.sock", Target::Unix("/run/x.sock".into())),
        ("/run/x", Target::File("/run/x".into())),
    ] {
        assert_eq!(text.parse(), Ok(target.clone()));
        assert_eq!(target.to_string(), text);
    }
}

struct Running {
    batches: mpsc::Receiver<Batch>,
    health: channel::Receiver<Health>,
    cancel: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    pending: Vec<String>,
}

/// Long enough for a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(30);

fn run(target: Target, quiet: Option<Duration>) -> Running {
    let (sender, batches) = mpsc::channel(16);
    let (report, health) = channel::channel(Health::default());
    let cancel = CancellationToken::new();
    let stream = Stream::open(SourceId(3), target, quiet).expect("opened");
    let task = tokio::spawn(stream.run(sender, report, cancel.clone()));
    Running {
        batches,
        health,
        cancel,
        task,
        pending: Vec::new(),
    }
}

impl Running {
    /// Waits for exactly these changes, however they are batched.
    async fn expect(&mut self, expected: &[&str]) {
        let all = async {
            while self.pending.len() < expected.len() {
                let batch = self.batches.recv().await.expect("running");
                assert_eq!(batch.source, SourceId(3));
                self.pending.extend(said(&batch.changes));
            }
        };
        timeout(PATIENCE, all).await.expect("in time");
        let rest = self.pending.split_off(expected.len());
        assert_eq!(self.pending, expected);
        self.pending = rest;
    }

    async fn stop(self) {
        self.cancel.cancel();
        timeout(PATIENCE, self.task)
            .await
            .expect("in time")
            .expect("no panic");
    }
}

fn directory() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("stream");
    (dir, path)
}

fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).expect("listening")
}

fn send(to: &mut impl std::io::Write, texts: &[String]) {
    to.write_all(texts.join("\n").as_bytes()).expect("sent");
}

/// The agent listens, for its own user only; a new connection is a new list; one that comes while
/// another stands takes its place; nothing changes while nobody is there.
#[tokio::test]
async fn a_socket() {
    let (_dir, path) = directory();
    let mut running = run(Target::Unix(path.clone()), None);
    let mode = fs::metadata(&path).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let mut first = connect(&path);
    send(
        &mut first,
        &[
            event("ADDED", &service("a")),
            end(),
            event("ADDED", &service("b")),
        ],
    );
    running.expect(&["resync", "+a", "complete", "+b"]).await;
    drop(first);

    let mut second = connect(&path);
    send(&mut second, &[event("ADDED", &service("a"))]);
    running.expect(&["resync", "+a"]).await;
    let mut third = connect(&path);
    running.expect(&["resync"]).await;
    send(&mut third, &[event("ADDED", &service("c")), end()]);
    running.expect(&["+c", "complete"]).await;
    // The one that was replaced is cut off: what it sends is not heard.
    assert!((0..100).any(|_| second.write_all(b"{}").is_err()));
    send(&mut third, &[event("DELETED", &service("c"))]);
    running.expect(&["-c"]).await;
    assert_eq!(running.health.borrow().malformed, 0);
    running.stop().await;
    assert!(!path.exists(), "the socket goes with the agent");
}

/// A socket that nobody listens on any more is replaced; one in use and other files are not.
#[tokio::test]
async fn stale_sockets_and_others() {
    let (_dir, path) = directory();
    drop(UnixListener::bind(&path).expect("bound"));
    run(Target::Unix(path.clone()), None).stop().await;

    let used = UnixListener::bind(&path).expect("bound");
    let error = Stream::open(SourceId(0), Target::Unix(path.clone()), None).expect_err("in use");
    assert!(
        error.to_string().ends_with("another process listens on it"),
        "{error}"
    );
    drop(used);

    fs::remove_file(&path).expect("removed");
    fs::write(&path, "precious").expect("written");
    let error = Stream::open(SourceId(0), Target::Unix(path.clone()), None).expect_err("a file");
    assert!(
        error.to_string().ends_with("exists and is no socket"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&path).expect("there"), "precious");
}

/// A malformed value is counted, placed and skipped, whatever it looks like inside; what follows
/// is heard.
#[tokio::test]
async fn malformed_values_are_skipped() {
    let (_dir, path) = directory();
    let mut running = run(Target::Unix(path.clone()), None);
    let mut sender = connect(&path);
    let good = event("ADDED", &service("a"));
    // Cut inside a string, so that the next value is taken apart.
    let whole = event("ADDED", &service("b"));
    let (cut, _) = whole.split_once("ervice").expect("a Service");
    let text = format!(
        "{good}{cut}{good}\n{}\n{}",
        event("ADDED", &service("c")),
        end()
    );
    send(&mut sender, &[text]);
    running.expect(&["resync", "+a", "+c", "complete"]).await;
    let health = running.health.borrow_and_update().clone();
    assert_eq!(
        (health.malformed, health.changes, health.listed),
        (1, 4, true)
    );
    let offset = good.len() + cut.len() + 2;
    let place = format!("--stream unix:{} at byte {offset}", path.display());
    assert_eq!(health.problems.len(), 1);
    assert_eq!(health.problems[0].place, place);

    send(
        &mut sender,
        &[event("ADDED", &service("d").replace("80", "0"))],
    );
    running.expect(&["?d"]).await;
    assert_eq!(running.health.borrow_and_update().malformed, 2);
    running.stop().await;
}

/// A fifo is opened again after each writer; each is a new list.
#[tokio::test]
async fn a_fifo() {
    let (_dir, path) = directory();
    mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).expect("made");
    let mut running = run(Target::File(path.clone()), None);
    let opened = path.clone();
    for name in ["a", "b"] {
        let path = path.clone();
        let texts = [event("ADDED", &service(name)), end()];
        let writer = tokio::task::spawn_blocking(move || {
            let mut fifo = fs::OpenOptions::new()
                .write(true)
                .open(path)
                .expect("opened");
            send(&mut fifo, &texts);
        });
        running
            .expect(&["resync", &format!("+{name}"), "complete"])
            .await;
        writer.await.expect("written");
        // A writer that comes before the reader has seen the end of the one before goes on with its list.
        timeout(PATIENCE, closed(&opened)).await.expect("in time");
    }
    running.stop().await;
}

/// Waits until this process has the file open no more.
async fn closed(path: &Path) {
    let is_open = || {
        let files = fs::read_dir("/proc/self/fd").expect("listed");
        files
            .filter_map(|file| fs::read_link(file.ok()?.path()).ok())
            .any(|link| link == path)
    };
    while is_open() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A file is read once; its end leaves the state; without any mark of the list's end nothing is
/// complete.
#[tokio::test]
async fn a_file() {
    let (_dir, path) = directory();
    for (text, expected, listed) in [
        (
            format!("{}{}", event("ADDED", &service("a")), end()),
            vec!["resync", "+a", "complete"],
            true,
        ),
        (event("ADDED", &service("a")), vec!["resync", "+a"], false),
        (
            format!("{}{{\"type\":", end()),
            vec!["resync", "complete"],
            true,
        ),
    ] {
        fs::write(&path, text).expect("written");
        let mut running = run(Target::File(path.clone()), None);
        running.expect(&expected).await;
        timeout(PATIENCE, running.task)
            .await
            .expect("ends")
            .expect("no panic");
        assert_eq!(running.health.borrow().listed, listed);
        assert!(running.batches.recv().await.is_none());
    }
    let error = Stream::open(SourceId(0), Target::File("/nonexistent".into()), None);
    let error = error.expect_err("not there").to_string();
    assert!(error.starts_with("--stream /nonexistent: "), "{error}");
}

/// A sender without bookmarks: the list ends when it was quiet for as long as was asked for, not
/// before anything came, and at the end of a file.
#[tokio::test]
async fn quiet_ends_the_list() {
    let (_dir, path) = directory();
    let quiet = Duration::from_millis(600);
    let mut running = run(Target::Unix(path.clone()), Some(quiet));
    let mut sender = connect(&path);
    running.expect(&["resync"]).await;
    tokio::time::sleep(quiet * 2).await;
    assert!(
        running.batches.try_recv().is_err(),
        "nothing was said, so nothing is complete"
    );
    for name in ["a", "b", "c"] {
        send(&mut sender, &[event("ADDED", &service(name))]);
        running.expect(&[&format!("+{name}")]).await;
        tokio::time::sleep(quiet / 6).await;
    }
    running.expect(&["complete"]).await;
    send(&mut sender, &[event("ADDED", &service("d"))]);
    running.expect(&["+d"]).await;
    running.stop().await;

    fs::write(&path, event("ADDED", &service("a"))).expect("written");
    let mut running = run(Target::File(path), Some(Duration::from_mins(1)));
    running.expect(&["resync", "+a", "complete"]).await;
}
