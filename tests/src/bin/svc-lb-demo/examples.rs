//! The Kubernetes objects of `examples/`: which pods to make, and the copy the agent watches.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use svc_lb_tests::lab::addresses::NODES;
use svc_lb_tests::lab::{Dual, LabBuilder, NodeName};

/// Pods that only call: one behind a routed veth, one on the bridge.
pub(crate) const SHELL: &str = "shell";
/// See [`SHELL`].
pub(crate) const SHELL_BRIDGED: &str = "shell-bridged";
/// The machine that is no node, for the Service without selector.
pub(crate) const LEGACY: &str = "legacy";

/// What the examples need.
#[derive(Debug)]
pub(crate) struct Examples {
    dir: PathBuf,
    pods: Vec<PodObject>,
    /// Machine addresses of v1 Endpoints that are no pods.
    legacy: Dual,
}

/// A Pod object.
#[derive(Debug)]
pub(crate) struct PodObject {
    pub(crate) name: String,
    pub(crate) node: NodeName,
    pub(crate) addr: Dual,
    pub(crate) image: String,
    pub(crate) ports: Vec<u16>,
}

impl Examples {
    /// Reads every file of `dir`.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let mut pods = Vec::new();
        let mut elsewhere = BTreeSet::new();
        for object in objects(dir)? {
            match text(&object, "/kind") {
                Some("Pod") => pods.push(PodObject::read(&object).with_context(|| {
                    let name = text(&object, "/metadata/name").unwrap_or("without a name");
                    format!("Pod {name} of {}", dir.display())
                })?),
                Some("Endpoints") => elsewhere.extend(endpoint_addresses(&object)),
                _ => {}
            }
        }
        if pods.is_empty() {
            bail!("{} holds no Pod: nothing to call", dir.display());
        }
        // The example's own address; its other family is ours to choose.
        let v4 = elsewhere
            .iter()
            .find_map(|ip| ip.parse().ok())
            .unwrap_or(NODES.nth(50).v4);
        Ok(Self {
            dir: dir.to_owned(),
            pods,
            legacy: Dual::new(v4, NODES.nth(0x50).v6),
        })
    }

    /// Adds a pod for each Pod object, pods and clients that call, and the machine.
    pub(crate) fn lab(&self, mut builder: LabBuilder) -> LabBuilder {
        for pod in &self.pods {
            builder = builder.pod_at(&pod.name, pod.node, pod.addr);
        }
        builder
            .routed(SHELL)
            .bridged(SHELL_BRIDGED)
            .machine(LEGACY, self.legacy)
            .clients(2)
    }

    /// A copy that may be edited.
    pub(crate) fn copy_to(self, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        for file in files(&self.dir)? {
            let to = dir.join(file.file_name().unwrap_or_default());
            fs::copy(&file, &to).with_context(|| format!("copy {}", file.display()))?;
        }
        Ok(Self {
            dir: dir.to_owned(),
            ..self
        })
    }

    /// Where the objects are.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The pods.
    pub(crate) fn pods(&self) -> &[PodObject] {
        &self.pods
    }

    /// A file's text.
    pub(crate) fn text(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Writes a file as a whole, as editors do: beside its place, then renamed.
    pub(crate) fn add(&self, file: &str, text: &str) -> Result<()> {
        let path = self.dir.join(file);
        let fresh = self.dir.join(format!(".{file}.new"));
        fs::write(&fresh, text).with_context(|| format!("write {}", fresh.display()))?;
        fs::rename(&fresh, &path).with_context(|| format!("rename to {}", path.display()))
    }
}

impl PodObject {
    fn read(object: &Value) -> Result<Self> {
        let ips = items(object, "/status/podIPs").filter_map(|ip| text(ip, "/ip"));
        let containers = || items(object, "/spec/containers");
        let node = match text(object, "/spec/nodeName") {
            Some("node-a") => NodeName::A,
            Some("node-b") => NodeName::B,
            other => bail!("spec.nodeName is {other:?}: the lab has node-a and node-b"),
        };
        let ports: BTreeSet<u16> = containers()
            .flat_map(|container| items(container, "/ports"))
            .filter_map(|port| port.pointer("/containerPort")?.as_u64()?.try_into().ok())
            .collect();
        Ok(Self {
            name: text(object, "/metadata/name")
                .context("metadata.name is missing")?
                .to_owned(),
            node,
            addr: Dual::parse(ips)
                .context("status.podIPs does not hold an address of each family")?,
            image: containers()
                .find_map(|container| text(container, "/image"))
                .context("spec.containers has no image")?
                .to_owned(),
            ports: ports.into_iter().collect(),
        })
    }
}

fn endpoint_addresses(object: &Value) -> impl Iterator<Item = String> {
    items(object, "/subsets")
        .flat_map(|subset| items(subset, "/addresses"))
        .filter_map(|address| text(address, "/ip"))
        .map(str::to_owned)
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn text<'a>(value: &'a Value, pointer: &str) -> Option<&'a str> {
    value.pointer(pointer)?.as_str()
}

fn objects(dir: &Path) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    for file in files(dir)? {
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let documents: Vec<Value> = serde_saphyr::from_multiple(&text)
            .with_context(|| format!("parse {}", file.display()))?;
        objects.extend(documents);
    }
    Ok(objects)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("read directory {}", dir.display()))?;
    let by_name: BTreeMap<_, _> = entries
        .flatten()
        .map(|entry| (entry.file_name(), entry.path()))
        .filter(|(_, path)| {
            path.extension()
                .is_some_and(|extension| extension == "yaml" || extension == "json")
        })
        .collect();
    Ok(by_name.into_values().collect())
}
