//! Building the lab's network.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::addresses::{
    BRIDGED, Dual, DualNet, EXTERNAL, Family, LB_POOL, NODE_A, NODE_B, OUTSIDE, PODS_A, PODS_B,
    ROUTER_NODES, ROUTER_OUTSIDE,
};
use super::cgroup::Cgroup;
use super::ethtool;
use super::netlink::{End, Mac, Netlink, Via};
use super::netns::Namespace;
use super::overlay;
use super::process::collected;
use super::run::{self, Machine, Run};

/// Ethernet address of the node's end of every routed pod's veth; gives [`POD_GATEWAY`]'s IPv6 address.
const GATEWAY_MAC: Mac = [0xee; 6];
/// The bridge's.
const BRIDGE_MAC: Mac = [0x02, 0, 0, 0, 0xb, 0x1];
/// The gateway of routed pods: answered by proxy ARP, and the link-local address of [`GATEWAY_MAC`].
const POD_GATEWAY: Dual = Dual::new(
    Ipv4Addr::new(169, 254, 1, 1),
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0xecee, 0xeeff, 0xfeee, 0xeeee),
);
/// The bridge of bridged pods.
pub const BRIDGE: &str = "cni0";
/// The interface of pods and hosts, and a node's first one towards the network.
pub const UPLINK: &str = "eth0";
/// What the names of the node's pod interfaces look like.
pub const POD_INTERFACES: &str = "veth*";

const IFNAMSIZ: usize = 15;
/// First pod and client addresses inside their networks.
const FIRST: u16 = 10;

/// A node of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NodeName {
    /// node-a: the node under test.
    A,
    /// node-b: a plain node with pods and no agent.
    B,
}

impl NodeName {
    /// The name in Kubernetes objects.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::A => "node-a",
            Self::B => "node-b",
        }
    }

    /// The node's own addresses.
    #[must_use]
    pub const fn addr(self) -> Dual {
        match self {
            Self::A => NODE_A,
            Self::B => NODE_B,
        }
    }
}

/// How a pod hangs on its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attach {
    /// A veth with a host route; the gateway is link-local.
    Routed,
    /// A port of the node's bridge, with the bridge as gateway.
    Bridged,
}

/// A pod: a namespace with one address of each family.
#[derive(Debug)]
pub struct Pod {
    name: String,
    addr: Dual,
    node: NodeName,
    attach: Attach,
    interface: String,
    namespace: Namespace,
}

impl Pod {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses.
    #[must_use]
    pub fn addr(&self) -> Dual {
        self.addr
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> NodeName {
        self.node
    }

    /// How it is attached.
    #[must_use]
    pub fn attach(&self) -> Attach {
        self.attach
    }

    /// The node's interface towards it.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Its namespace.
    #[must_use]
    pub fn ns(&self) -> &Namespace {
        &self.namespace
    }
}

/// A machine that is no node: an outside client behind the router, a server beside the nodes.
#[derive(Debug)]
pub struct Host {
    name: String,
    addr: Dual,
    namespace: Namespace,
}

impl Host {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its addresses.
    #[must_use]
    pub fn addr(&self) -> Dual {
        self.addr
    }

    /// Its namespace.
    #[must_use]
    pub fn ns(&self) -> &Namespace {
        &self.namespace
    }
}

/// What a pod is to be.
#[derive(Debug, Clone)]
struct PodSpec {
    name: String,
    node: NodeName,
    attach: Attach,
    addr: Option<Dual>,
}

/// A description of the network a test needs.
#[derive(Debug)]
pub struct LabBuilder {
    test: String,
    pods: Vec<PodSpec>,
    clients: u16,
    machines: Vec<(String, Dual)>,
    node_b: bool,
    overlay: bool,
    vlans: Vec<u16>,
    rp_filter: u8,
    uplink_offload: bool,
}

impl LabBuilder {
    /// Adds a routed pod of node-a.
    #[must_use]
    pub fn routed(self, name: &str) -> Self {
        self.with(name, NodeName::A, Attach::Routed, None)
    }

    /// Adds a pod on node-a's bridge.
    #[must_use]
    pub fn bridged(self, name: &str) -> Self {
        self.with(name, NodeName::A, Attach::Bridged, None)
    }

    /// Adds a routed pod of node-b, and node-b with it.
    #[must_use]
    pub fn remote(self, name: &str) -> Self {
        self.with(name, NodeName::B, Attach::Routed, None)
    }

    /// Adds a pod with given addresses, which say where it belongs: in [`BRIDGED`] it is a bridged pod.
    #[must_use]
    pub fn pod_at(self, name: &str, node: NodeName, addr: Dual) -> Self {
        self.with(name, node, attach_of(addr), Some(addr))
    }

    /// Adds `count` outside clients.
    #[must_use]
    pub fn clients(mut self, count: u16) -> Self {
        self.clients += count;
        self
    }

    /// Adds a machine that is no node to the nodes' network.
    #[must_use]
    pub fn machine(mut self, name: &str, addr: Dual) -> Self {
        self.machines.push((name.to_owned(), addr));
        self
    }

    /// Adds node-b even if it has no pod.
    #[must_use]
    pub fn node_b(mut self) -> Self {
        self.node_b = true;
        self
    }

    /// Joins the nodes' pods by VXLAN in place of routes, and adds node-b: see [`super::overlay`].
    #[must_use]
    pub fn overlay(mut self) -> Self {
        self.overlay = true;
        self.node_b = true;
        self
    }

    /// Puts node-a's network behind these VLANs of its `eth0`, the outermost first: its uplink is then `eth0.100`, or
    /// `eth0.100.200`. The outer of two tags is 802.1ad's.
    #[must_use]
    pub fn vlans(mut self, ids: &[u16]) -> Self {
        self.vlans = ids.to_vec();
        self
    }

    /// Sets node-a's reverse path filter: 0 off (the default here), 1 strict, 2 loose.
    #[must_use]
    pub fn rp_filter(mut self, mode: u8) -> Self {
        self.rp_filter = mode;
        self
    }

    /// Leaves checksum and segmentation offload of node-a's uplink on; packets then reach the wire with partial
    /// checksums.
    #[must_use]
    pub fn uplink_offload(mut self) -> Self {
        self.uplink_offload = true;
        self
    }

    /// Names the directory of the lab's files; the default is the test's name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.test);
        self
    }

    /// Makes the network.
    pub fn build(self) -> Result<Lab> {
        Lab::make(self, None)
    }

    /// Makes the network on a machine the caller has for itself.
    pub fn build_alone(self, machine: &Machine) -> Result<Lab> {
        Lab::make(self, Some(machine))
    }

    fn with(mut self, name: &str, node: NodeName, attach: Attach, addr: Option<Dual>) -> Self {
        self.node_b |= node == NodeName::B;
        self.pods.push(PodSpec {
            name: name.to_owned(),
            node,
            attach,
            addr,
        });
        self
    }
}

/// The network. Dropping it removes every part of it.
#[derive(Debug)]
pub struct Lab {
    // In the order in which they are dropped.
    pods: BTreeMap<String, Pod>,
    clients: Vec<Host>,
    machines: BTreeMap<String, Host>,
    node_a: Arc<Namespace>,
    node_b: Option<Namespace>,
    router: Namespace,
    /// node-a's interface with its address.
    uplink: String,
    overlay: bool,
    dir: PathBuf,
    run: Run,
}

impl Lab {
    /// An empty network: node-a and the router. Named after the running test.
    #[must_use]
    pub fn builder() -> LabBuilder {
        LabBuilder {
            test: thread::current().name().unwrap_or("lab").to_owned(),
            pods: Vec::new(),
            clients: 0,
            machines: Vec::new(),
            node_b: false,
            overlay: false,
            vlans: Vec::new(),
            rp_filter: 0,
            uplink_offload: false,
        }
    }

    /// The run's names.
    #[must_use]
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// Where this lab's files are kept, also after its end: logs, configuration.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The node under test.
    #[must_use]
    pub fn node_a(&self) -> &Namespace {
        &self.node_a
    }

    pub(super) fn node_a_shared(&self) -> Arc<Namespace> {
        Arc::clone(&self.node_a)
    }

    /// The second node.
    ///
    /// # Panics
    /// If the lab was built without it.
    #[must_use]
    pub fn node_b(&self) -> &Namespace {
        match &self.node_b {
            Some(node) => node,
            None => panic!("this lab has no node-b"),
        }
    }

    /// Whether there is a second node.
    #[must_use]
    pub fn has_node_b(&self) -> bool {
        self.node_b.is_some()
    }

    /// node-a's interface with its address towards the network.
    #[must_use]
    pub fn uplink(&self) -> &str {
        &self.uplink
    }

    /// Whether the nodes' pods are joined by VXLAN.
    #[must_use]
    pub fn has_overlay(&self) -> bool {
        self.overlay
    }

    /// All of node-a's interfaces towards other machines.
    pub fn uplinks(&self) -> impl Iterator<Item = &str> {
        // Frames with tags come in by it; no address is on it then.
        let trunk = (self.uplink != UPLINK).then_some(UPLINK);
        let overlay = self.overlay.then_some(overlay::INTERFACE);
        [self.uplink()].into_iter().chain(trunk).chain(overlay)
    }

    /// The network between the nodes and the outside.
    #[must_use]
    pub fn router(&self) -> &Namespace {
        &self.router
    }

    /// A pod by name.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn pod(&self, name: &str) -> &Pod {
        match self.pods.get(name) {
            Some(pod) => pod,
            None => panic!("this lab has no pod {name}"),
        }
    }

    /// All pods in order of name.
    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    /// All outside clients.
    pub fn clients(&self) -> impl Iterator<Item = &Host> {
        self.clients.iter()
    }

    /// An outside client by number.
    ///
    /// # Panics
    /// If there are fewer.
    #[must_use]
    pub fn client(&self, n: usize) -> &Host {
        match self.clients.get(n) {
            Some(client) => client,
            None => panic!("this lab has no client {n}"),
        }
    }

    /// A machine beside the nodes by name.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn machine(&self, name: &str) -> &Host {
        match self.machines.get(name) {
            Some(host) => host,
            None => panic!("this lab has no machine {name}"),
        }
    }

    /// Adds a pod to the running lab, like [`LabBuilder::routed`] and its siblings.
    pub fn add_pod(&mut self, name: &str, node: NodeName, attach: Attach) -> Result<&Pod> {
        let spec = PodSpec {
            name: name.to_owned(),
            node,
            attach,
            addr: None,
        };
        self.make_pod(spec)?;
        Ok(self.pod(name))
    }

    /// Adds a pod with given addresses, like [`LabBuilder::pod_at`].
    pub fn add_pod_at(&mut self, name: &str, node: NodeName, addr: Dual) -> Result<&Pod> {
        let spec = PodSpec {
            name: name.to_owned(),
            node,
            attach: attach_of(addr),
            addr: Some(addr),
        };
        self.make_pod(spec)?;
        Ok(self.pod(name))
    }

    /// Removes a pod: its namespace with its servers, its interface, its routes.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self
            .pods
            .remove(name)
            .with_context(|| format!("no pod {name}"))?;
        self.node(pod.node)?.netlink().remove(&pod.interface)
    }

    /// Feeds rules to `nft -f -` on node-a.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let file = self.dir.join("rules.nft");
        std::fs::write(&file, rules).with_context(|| format!("write {}", file.display()))?;
        let mut nft = collected("nft");
        nft.arg("-f").arg(&file);
        let output = self.node_a.start(nft)?.output(Duration::from_secs(10))?;
        if !output.status.success() {
            bail!("nft: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    fn make(spec: LabBuilder, machine: Option<&Machine>) -> Result<Self> {
        raise_file_limit()?;
        let run = Run::start(machine)?;
        let dir = run::scratch(&spec.test)?;
        let router = host(&run, "net", 0, None)?;
        router.netlink().bridge("nodes")?;
        assign(router.netlink(), "nodes", ROUTER_NODES, 24, 64)?;
        let (node_a, uplink) = node(&run, &router, NodeName::A, &spec.vlans, spec.rp_filter)?;
        if !spec.uplink_offload {
            node_a.run(|| ethtool::tx_checksum_off(UPLINK))?;
        }
        let node_b = if spec.node_b {
            let (node_b, _) = node(&run, &router, NodeName::B, &[], 0)?;
            node_b.run(|| ethtool::tx_checksum_off(UPLINK))?;
            Some(node_b)
        } else {
            None
        };
        match &node_b {
            Some(node_b) if spec.overlay => overlay::join(&node_a, &uplink, node_b)?,
            Some(node_b) => {
                to_net(node_a.netlink(), PODS_B, &uplink, NODE_B)?;
                to_net(node_b.netlink(), PODS_A, UPLINK, NODE_A)?;
                to_net(router.netlink(), PODS_B, "nodes", NODE_B)?;
            }
            None => {}
        }
        for net in [LB_POOL, EXTERNAL] {
            to_net(router.netlink(), net, "nodes", NODE_A)?;
        }
        if !spec.overlay {
            to_net(router.netlink(), PODS_A, "nodes", NODE_A)?;
        }
        let mut lab = Self {
            pods: BTreeMap::new(),
            clients: Vec::new(),
            machines: BTreeMap::new(),
            node_a: Arc::new(node_a),
            node_b,
            router,
            uplink,
            overlay: spec.overlay,
            dir,
            run,
        };
        for n in 0..spec.clients {
            lab.make_client(n)?;
        }
        for (name, addr) in spec.machines {
            let machine = lab.make_host("nodes", name.clone(), addr, ROUTER_NODES)?;
            lab.machines.insert(name, machine);
        }
        for pod in spec.pods {
            lab.make_pod(pod)?;
        }
        Ok(lab)
    }

    fn node(&self, name: NodeName) -> Result<&Namespace> {
        match name {
            NodeName::A => Ok(&self.node_a),
            NodeName::B => self.node_b.as_ref().context("this lab has no node-b"),
        }
    }

    fn make_client(&mut self, n: u16) -> Result<()> {
        if n == 0 {
            self.router.netlink().bridge("outside")?;
            assign(self.router.netlink(), "outside", ROUTER_OUTSIDE, 24, 64)?;
        }
        let addr = OUTSIDE.nth(FIRST + n);
        let client = self.make_host("outside", format!("client-{n}"), addr, ROUTER_OUTSIDE)?;
        self.clients.push(client);
        Ok(())
    }

    /// A host on one of the router's bridges; its own offload is off, as it plays the outside world.
    fn make_host(&self, bridge: &str, name: String, addr: Dual, gateway: Dual) -> Result<Host> {
        let namespace = host(&self.run, &name, 0, None)?;
        cable(&self.router, bridge, &name, &namespace)?;
        assign(namespace.netlink(), UPLINK, addr, 24, 64)?;
        default_route(namespace.netlink(), UPLINK, gateway)?;
        namespace.run(|| ethtool::tx_checksum_off(UPLINK))?;
        Ok(Host {
            name,
            addr,
            namespace,
        })
    }

    fn make_pod(&mut self, spec: PodSpec) -> Result<()> {
        let PodSpec {
            name,
            node,
            attach,
            addr,
        } = spec;
        if self.pods.contains_key(&name) {
            bail!("there is already a pod {name}");
        }
        let addr = match addr {
            Some(addr) => addr,
            None => self.free_address(node, attach)?,
        };
        let home = self.node(node)?;
        let cgroup = home
            .cgroup()
            .map(|cgroup| cgroup.child(&name))
            .transpose()?;
        let namespace = host(&self.run, &format!("pod-{name}"), 0, cgroup)?;
        let interface: String = format!("veth{name}").chars().take(IFNAMSIZ).collect();
        home.netlink().veth(
            End {
                name: &interface,
                mac: (attach == Attach::Routed).then_some(GATEWAY_MAC),
            },
            End {
                name: UPLINK,
                mac: None,
            },
            namespace.fd(),
        )?;
        match attach {
            Attach::Routed => route_pod(home, &interface, namespace.netlink(), addr)?,
            Attach::Bridged => bridge_pod(home, &interface, namespace.netlink(), addr)?,
        }
        self.pods.insert(
            name.clone(),
            Pod {
                name,
                addr,
                node,
                attach,
                interface,
                namespace,
            },
        );
        Ok(())
    }

    fn free_address(&self, node: NodeName, attach: Attach) -> Result<Dual> {
        let net = match (node, attach) {
            (NodeName::A, Attach::Routed) => PODS_A,
            (NodeName::A, Attach::Bridged) => BRIDGED,
            (NodeName::B, _) => PODS_B,
        };
        (FIRST..120)
            .map(|n| net.nth(n))
            .find(|addr| self.pods.values().all(|pod| pod.addr != *addr))
            .context("no free pod address")
    }
}

/// How a pod with these addresses is attached.
fn attach_of(addr: Dual) -> Attach {
    if BRIDGED.holds(addr) {
        Attach::Bridged
    } else {
        Attach::Routed
    }
}

/// Thousands of connections have both their ends in this process.
fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).context("read the limit of open files")?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise the limit of open files")
}

/// A namespace in which IPv6 addresses are usable at once.
fn host(run: &Run, name: &str, rp_filter: u8, cgroup: Option<Cgroup>) -> Result<Namespace> {
    let namespace = Namespace::create(run, name, cgroup)?;
    let rp_filter = rp_filter.to_string();
    let settings = [
        ("net.ipv6.conf.all.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_dad", "0"),
        ("net.ipv6.conf.default.accept_ra", "0"),
        ("net.ipv4.conf.all.rp_filter", &rp_filter),
        ("net.ipv4.conf.default.rp_filter", &rp_filter),
    ];
    for (key, value) in settings {
        namespace.sysctl(key, value)?;
    }
    Ok(namespace)
}

fn forwarding(namespace: &Namespace) -> Result<()> {
    namespace.sysctl("net.ipv4.ip_forward", "1")?;
    namespace.sysctl("net.ipv6.conf.all.forwarding", "1")
}

/// A node, and its uplink's name.
fn node(
    run: &Run,
    router: &Namespace,
    name: NodeName,
    vlans: &[u16],
    rp_filter: u8,
) -> Result<(Namespace, String)> {
    // Whoever is in it belongs to the node that has an agent.
    let cgroup = match name {
        NodeName::A => Some(Cgroup::of_run(run.id(), name.as_str())?),
        NodeName::B => None,
    };
    let namespace = host(run, name.as_str(), rp_filter, cgroup)?;
    forwarding(&namespace)?;
    if name == NodeName::A {
        forwarding(router)?;
    }
    cable(router, "nodes", name.as_str(), &namespace)?;
    let uplink = if vlans.is_empty() {
        UPLINK.to_owned()
    } else {
        let port = tag(router.netlink(), name.as_str(), vlans)?;
        router.netlink().free(name.as_str())?;
        router.netlink().bridge_port("nodes", &port)?;
        tag(namespace.netlink(), UPLINK, vlans)?
    };
    assign(namespace.netlink(), &uplink, name.addr(), 24, 64)?;
    default_route(namespace.netlink(), &uplink, ROUTER_NODES)?;
    Ok((namespace, uplink))
}

/// VLAN interfaces above one, each above the one before; the name of the last.
fn tag(netlink: &Netlink, below: &str, vlans: &[u16]) -> Result<String> {
    let mut top = below.to_owned();
    for (depth, id) in vlans.iter().enumerate() {
        let name = format!("{top}.{id}");
        netlink.vlan(&name, &top, *id, depth + 1 < vlans.len())?;
        top = name;
    }
    Ok(top)
}

/// A veth from the router's bridge to `eth0` of another namespace; the router's end has its offload off.
fn cable(router: &Namespace, bridge: &str, port: &str, to: &Namespace) -> Result<()> {
    let near = End {
        name: port,
        mac: None,
    };
    let far = End {
        name: UPLINK,
        mac: None,
    };
    router.netlink().veth(near, far, to.fd())?;
    router.run(|| ethtool::tx_checksum_off(port))?;
    router.netlink().bridge_port(bridge, port)?;
    to.netlink().up(UPLINK)
}

fn route_pod(home: &Namespace, interface: &str, pod: &Netlink, addr: Dual) -> Result<()> {
    home.sysctl(&format!("net/ipv4/conf/{interface}/proxy_arp"), "1")?;
    // An answer by proxy ARP otherwise waits a random time.
    home.sysctl(&format!("net/ipv4/neigh/{interface}/proxy_delay"), "0")?;
    home.netlink().up(interface)?;
    pod.up(UPLINK)?;
    for family in Family::BOTH {
        let (ip, len) = (addr.of(family), host_len(family));
        home.netlink().route(ip, len, Via::link(interface))?;
        pod.address(UPLINK, ip, len)?;
    }
    default_route(pod, UPLINK, POD_GATEWAY)
}

fn bridge_pod(home: &Namespace, interface: &str, pod: &Netlink, addr: Dual) -> Result<()> {
    let gateway = BRIDGED.nth(1);
    if home.netlink().index(BRIDGE).is_err() {
        home.netlink().bridge(BRIDGE)?;
        // Else it has that of a port, and another one when the port goes.
        home.netlink().mac(BRIDGE, BRIDGE_MAC)?;
        assign(
            home.netlink(),
            BRIDGE,
            gateway,
            BRIDGED.v4_len,
            BRIDGED.v6_len,
        )?;
    }
    home.netlink().bridge_port(BRIDGE, interface)?;
    pod.up(UPLINK)?;
    assign(pod, UPLINK, addr, BRIDGED.v4_len, BRIDGED.v6_len)?;
    default_route(pod, UPLINK, gateway)
}

pub(super) fn assign(
    netlink: &Netlink,
    interface: &str,
    addr: Dual,
    v4_len: u8,
    v6_len: u8,
) -> Result<()> {
    netlink.address(interface, addr.v4.into(), v4_len)?;
    netlink.address(interface, addr.v6.into(), v6_len)
}

fn default_route(netlink: &Netlink, interface: &str, gateway: Dual) -> Result<()> {
    let zero: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
    for (to, via) in zero.into_iter().zip(gateway.both()) {
        netlink.route(to, 0, Via::gateway(interface, via))?;
    }
    Ok(())
}

fn to_net(netlink: &Netlink, to: DualNet, interface: &str, gateway: Dual) -> Result<()> {
    for family in Family::BOTH {
        netlink.route(
            to.base.of(family),
            to.len(family),
            Via::gateway(interface, gateway.of(family)),
        )?;
    }
    Ok(())
}

const fn host_len(family: Family) -> u8 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}
