//! What `deploy/` has for a cluster is what a cluster understands, and what the agent does.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, PolicyRule};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

fn documents(name: &str) -> Vec<Value> {
    let mut text: &[u8] = &fs::read(deploy().join(name)).unwrap();
    serde_saphyr::read::<_, Value>(&mut text)
        .collect::<Result<_, _>>()
        .unwrap()
}

/// The object as its type, which must have every field of it.
fn typed<T: DeserializeOwned + Serialize>(value: &Value) -> T {
    let object: T = serde_json::from_value(value.clone()).unwrap();
    let mut kept = serde_json::to_value(&object).unwrap();
    for key in ["kind", "apiVersion"] {
        let same = kept.get(key) == value.get(key);
        assert!(
            same,
            "{key}: {:?} is not {:?}",
            value.get(key),
            kept.get(key)
        );
    }
    covers("", &mut kept, value);
    object
}

fn covers(path: &str, kept: &mut Value, written: &Value) {
    match (kept, written) {
        (Value::Object(kept), Value::Object(written)) => {
            for (key, value) in written {
                let path = format!("{path}.{key}");
                let kept = kept.get_mut(key);
                covers(
                    &path,
                    kept.unwrap_or_else(|| panic!("{path}: no such field")),
                    value,
                );
            }
        }
        (Value::Array(kept), Value::Array(written)) => {
            assert_eq!(kept.len(), written.len(), "{path}");
            for (i, (kept, value)) in kept.iter_mut().zip(written).enumerate() {
                covers(&format!("{path}[{i}]"), kept, value);
            }
        }
        (kept, written) => assert_eq!(kept, written, "{path}"),
    }
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    objects
        .iter()
        .find(|object| object.get("kind").is_some_and(|found| found == kind))
        .unwrap_or_else(|| panic!("no {kind}"))
}

#[test]
fn every_file_is_part_of_the_base() {
    let base = documents("kustomization.yaml").remove(0);
    let resources = base.get("resources").and_then(Value::as_array).unwrap();
    let named: BTreeSet<String> = resources
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect();
    let files = fs::read_dir(deploy()).unwrap();
    let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
    let is_yaml = |name: &String| Path::new(name).extension().is_some_and(|end| end == "yaml");
    let mut yaml: BTreeSet<String> = files.filter(is_yaml).collect();
    assert!(yaml.remove("kustomization.yaml"));
    assert_eq!(yaml, named);
}

/// The agent lists and watches three kinds: the role allows this and nothing else.
#[test]
fn the_role_is_the_least_there_can_be() {
    let objects = documents("rbac.yaml");
    assert_eq!(objects.len(), 3);
    let account: ServiceAccount = typed(of_kind(&objects, "ServiceAccount"));
    let role: ClusterRole = typed(of_kind(&objects, "ClusterRole"));
    let binding: ClusterRoleBinding = typed(of_kind(&objects, "ClusterRoleBinding"));
    let mut allowed = Vec::new();
    for rule in role.rules.unwrap() {
        let PolicyRule {
            api_groups,
            resources,
            verbs,
            ..
        } = rule;
        for group in api_groups.unwrap() {
            for resource in resources.iter().flatten() {
                allowed.push(format!("{group}/{resource}: {}", verbs.join(" ")));
            }
        }
    }
    assert_eq!(
        allowed,
        [
            "/services: list watch",
            "/nodes: list watch",
            "discovery.k8s.io/endpointslices: list watch",
        ]
    );
    assert_eq!(binding.role_ref.name, role.metadata.name.unwrap());
    let subject = binding.subjects.unwrap().remove(0);
    assert_eq!(subject.name, account.metadata.name.unwrap());
    assert_eq!(subject.namespace, account.metadata.namespace);
}

#[test]
fn the_pod_is_what_it_takes() {
    let set: DaemonSet = typed(documents("daemonset.yaml").first().unwrap());
    let spec = set.spec.unwrap();
    let labels = spec.template.metadata.unwrap().labels.unwrap();
    assert_eq!(spec.selector.match_labels.unwrap(), labels);
    let pod = spec.template.spec.unwrap();
    assert_eq!(pod.host_network, Some(true));
    assert_eq!(pod.service_account_name.as_deref(), Some("svc-lb"));
    let container = pod.containers.first().unwrap();
    let mounts = container.volume_mounts.iter().flatten();
    let mounted: BTreeSet<&str> = mounts.map(|mount| mount.name.as_str()).collect();
    let volumes = pod.volumes.as_ref().unwrap();
    assert_eq!(
        mounted,
        volumes.iter().map(|volume| volume.name.as_str()).collect()
    );
}

/// The ConfigMap's file is one that this binary takes, by itself and with the pod's environment.
#[test]
fn the_configuration_can_be_used() {
    let map: ConfigMap = typed(documents("config.yaml").first().unwrap());
    let text = map.data.unwrap().remove("config.yaml").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.yaml");
    fs::write(&file, text).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_svc-lb"))
        .args(["config", "show", "--config"])
        .arg(&file)
        .env_clear()
        .env("NODE_NAME", "node-1")
        .output()
        .unwrap();
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for key in ["source", "api-server", "service-cidr"] {
        let line = shown.lines().find(|line| line.starts_with(key)).unwrap();
        assert!(line.ends_with("# file"), "{line}");
    }
}
