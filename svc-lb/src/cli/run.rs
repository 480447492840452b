//! `svc-lb run`.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{ArgAction, ValueEnum};
use ipnet::IpNet;
use svc_lb_common::config::{self, Config};
use svc_lb_common::hash::text_hash;
use tracing::warn;

use super::Global;
use super::args::EdgeArgs;
use super::cluster::ClusterArgs;
use super::config::Effective;
use crate::app::{self, Settings};
use crate::compile::{CompileOptions, MaglevOptions};
use crate::dataplane::Timeouts;
use crate::dataplane::attach::TcHook;
use crate::dataplane::sizes::SizeOverride;
use crate::dataplane::sockets::{SocketMode, SocketSettings};
use crate::dataplane::timeouts::{self, StateTimeout};
use crate::health::proxy::Bind;
use crate::model::Algorithm;
use crate::node::ports::NodePorts;
use crate::source::Spec;
use crate::source::stream::Target;
use crate::standalone;

/// A change that may take longer needs no bound at all.
const LONGEST_PERIOD: Duration = Duration::from_hours(24);

const NO_SOURCE: &str = "nothing says what to balance: give --kubeconfig, --manifests or --stream; in \
                         a pod of a cluster, its service account is used";

/// Run the agent of this node: keep the maps equal to what the sources say.
///
/// Adopts what an earlier agent left pinned, replaces its programs in place, and leaves everything
/// in place when it ends, by whatever means: traffic goes on. `svc-lb detach` removes it.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Exit codes:
  0  ended by SIGTERM or SIGINT; programs and flows stay
  1  cannot run, the message says why
  2  the command line is wrong

Examples:
  svc-lb run --manifests examples/ --service-cidr 10.96.0.0/16
  svc-lb run --kubeconfig /etc/svc-lb/kubeconfig --api-server https://192.0.2.1:6443,https://192.0.2.2:6443
  kubectl get --raw '/apis/discovery.k8s.io/v1/endpointslices?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true' | svc-lb run --stream - --manifests services/
  svc-lb run --stream unix:/run/svc-lb/endpoints.sock --stream-initial-quiet 500ms
  svc-lb run --manifests objects.yaml --uplink 'ens*' --pod-interface 'cali*' --log debug")]
pub(super) struct Args {
    /// Kubernetes objects in YAML or JSON: a file or a directory, watched; may be repeated
    #[arg(
        long,
        value_name = "PATH",
        env = "SVC_LB_MANIFESTS",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    manifests: Vec<PathBuf>,
    /// Kubernetes watch events as concatenated JSON values: - for standard input, a file or fifo,
    /// or unix:PATH for a socket to listen on; may be repeated
    #[arg(
        long,
        value_name = "TARGET",
        env = "SVC_LB_STREAM",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    stream: Vec<Target>,
    /// How long a stream without the bookmark that ends its first list may be silent until the
    /// list counts as complete [default: for ever]
    #[arg(long, value_name = "DURATION", env = "SVC_LB_STREAM_INITIAL_QUIET")]
    stream_initial_quiet: Option<humantime::Duration>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Name that endpoints and hints use for this node [default: $NODE_NAME, else the host name]
    #[arg(long, value_name = "NAME", env = "SVC_LB_NODE_NAME")]
    node_name: Option<String>,
    /// Handle the Services whose label service.kubernetes.io/service-proxy-name is NAME; those
    /// without the label otherwise
    #[arg(long, value_name = "NAME", env = "SVC_LB_SERVICE_PROXY_NAME")]
    service_proxy_name: Option<String>,
    /// Where NodePorts are served: all, primary (what the Node object calls the node, else the
    /// default route's first address), or ranges of the node's addresses. A family that is not spoken
    /// of is served on all. The default is that of kube-proxy's iptables mode; its nftables mode
    /// has primary
    #[arg(
        long,
        value_name = "all|primary|CIDR",
        env = "SVC_LB_NODEPORT_ADDRESSES",
        value_delimiter = ',',
        action = ArgAction::Append,
        default_value = "all"
    )]
    nodeport_addresses: Vec<NodePorts>,
    /// Who is served at the externalIPs of Services. Whoever may write Services can claim any address
    /// there and have the packets that pods send to it (CVE-2020-8554)
    #[arg(
        long,
        value_name = "WHOM",
        env = "SVC_LB_EXTERNAL_IPS",
        value_enum,
        default_value_t
    )]
    external_ips: ExternalIps,
    #[command(flatten)]
    refusals: RefusalArgs,
    #[command(flatten)]
    selection: SelectionArgs,
    #[command(flatten)]
    health: HealthArgs,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    sockets: SocketArgs,
    #[command(flatten)]
    control_plane: ControlPlaneArgs,
    #[command(flatten)]
    edges: EdgeArgs,
    #[command(flatten)]
    dataplane: DataplaneArgs,
}

#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "Refusals")]
struct RefusalArgs {
    /// What clients get where a Local policy finds no endpoint on this node
    #[arg(
        long,
        value_name = "ANSWER",
        env = "SVC_LB_NO_LOCAL_ENDPOINT",
        value_enum,
        default_value_t
    )]
    no_local_endpoint: NoLocalEndpoint,
    /// What clients get at a port that a ClusterIP does not have
    #[arg(
        long,
        value_name = "ANSWER",
        env = "SVC_LB_UNDEFINED_PORT",
        value_enum,
        default_value_t
    )]
    undefined_port: UndefinedPort,
    /// What becomes of packets to an address of --service-cidr that no Service has
    #[arg(
        long,
        value_name = "FATE",
        env = "SVC_LB_UNALLOCATED_ADDRESS",
        value_enum,
        default_value_t
    )]
    unallocated_address: UnallocatedAddress,
    /// Whose open TCP connections are reset when their backend is gone for good: no endpoint any more, and the pod's
    /// interface gone
    #[arg(
        long,
        value_name = "WHOSE",
        env = "SVC_LB_RESET_GONE_BACKENDS",
        value_enum,
        default_value_t
    )]
    reset_gone_backends: ResetGoneBackends,
}

impl RefusalArgs {
    /// The programs' settings, in place of those in `bits`.
    fn apply(self, bits: u32) -> u32 {
        let Self {
            no_local_endpoint,
            undefined_port,
            unallocated_address,
            reset_gone_backends,
        } = self;
        [
            (
                config::RESET_VANISHED,
                reset_gone_backends == ResetGoneBackends::Local,
            ),
            (
                config::REJECT_NO_LOCAL,
                no_local_endpoint == NoLocalEndpoint::Reject,
            ),
            (
                config::REJECT_UNDEFINED_PORT,
                undefined_port == UndefinedPort::Reject,
            ),
            (
                config::DROP_UNALLOCATED,
                unallocated_address == UnallocatedAddress::Drop,
            ),
        ]
        .into_iter()
        .fold(
            bits,
            |bits, (bit, on)| {
                if on { bits | bit } else { bits & !bit }
            },
        )
    }
}

/// `--undefined-port`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum UndefinedPort {
    /// Connection refused, as by kube-proxy's nftables mode.
    #[default]
    Reject,
    /// Nothing, as by its iptables mode: packets go where routes lead, but do not leave the node.
    Pass,
}

/// `--unallocated-address`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum UnallocatedAddress {
    /// They are dropped, as by kube-proxy's nftables mode: nothing goes in circles.
    #[default]
    Drop,
    /// They go where the node's routes lead, as by its iptables mode.
    Pass,
}

/// `--reset-gone-backends`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum ResetGoneBackends {
    /// Nobody's, as by kube-proxy: their ends wait until they give up.
    #[default]
    Off,
    /// Those to pods of this node, on the client's next packet.
    Local,
}

/// `--no-local-endpoint`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum NoLocalEndpoint {
    /// Nothing: load balancers then try another node.
    #[default]
    Drop,
    /// Connection refused.
    Reject,
}

/// `--external-ips`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum ExternalIps {
    /// Everyone, as by kube-proxy.
    #[default]
    All,
    /// Clients outside the node: to its pods, and to itself, the addresses are what they are without
    /// Services.
    Outside,
    /// Nobody.
    Off,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Selection of backends")]
struct SelectionArgs {
    /// How new flows find their backend, where a Service has no annotation svc-lb.io/lb-algorithm
    #[arg(
        long,
        value_name = "ALGORITHM",
        env = "SVC_LB_LB_ALGORITHM",
        value_enum,
        default_value_t
    )]
    lb_algorithm: LbAlgorithm,
    /// Any text, the same on every node: with it, all nodes pick the same backend for a flow of a
    /// Service that uses Maglev. Clients who know it can choose their backend
    #[arg(
        long,
        value_name = "TEXT",
        env = "SVC_LB_MAGLEV_SEED",
        hide_env_values = true,
        default_value = "",
        hide_default_value = true
    )]
    maglev_seed: String,
    /// The least size of a Maglev table, the same on every node; for more endpoints than a
    /// hundredth of it, the next one is used. Each Service port has up to two tables of four bytes
    /// to a slot, in the map slots
    #[arg(
        long,
        value_name = "SLOTS",
        env = "SVC_LB_MAGLEV_TABLE_SIZE",
        value_parser = table_size,
        default_value = "65521"
    )]
    maglev_table_size: u16,
}

/// `--lb-algorithm`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum LbAlgorithm {
    /// By a hash that differs from node to node.
    #[default]
    Random,
    /// By a table and a hash that all nodes share: a backend that leaves moves hardly any flow of
    /// another one.
    Maglev,
}

impl From<LbAlgorithm> for Algorithm {
    fn from(algorithm: LbAlgorithm) -> Self {
        match algorithm {
            LbAlgorithm::Random => Self::Random,
            LbAlgorithm::Maglev => Self::Maglev,
        }
    }
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Health")]
struct HealthArgs {
    /// Where /healthz and /livez answer, as kube-proxy's do: ADDRESS:PORT, or off. 0.0.0.0 is every
    /// address of both families. Load balancers ask from outside the node; nothing can be changed
    /// there, and nothing learned but what they need
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "SVC_LB_HEALTHZ_BIND_ADDRESS",
        default_value = "0.0.0.0:10256"
    )]
    healthz_bind_address: Bind,
    /// Where /metrics, /proxyMode and /configz answer, for this node's own tools: ADDRESS:PORT, or off
    #[arg(
        long,
        value_name = "ADDRESS:PORT",
        env = "SVC_LB_METRICS_BIND_ADDRESS",
        default_value = "127.0.0.1:10249"
    )]
    metrics_bind_address: Bind,
    /// How long a change may take to be programmed; the node counts as unhealthy when one has been
    /// waiting twice as long
    #[arg(
        long,
        value_name = "DURATION",
        env = "SVC_LB_SYNC_PERIOD",
        value_parser = period,
        default_value = "30s"
    )]
    sync_period: Duration,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Translated sources")]
struct SourceArgs {
    /// Whose packets from outside get this node's address as their source: those to a backend of
    /// another node, or all but those that externalTrafficPolicy Local covers, as with kube-proxy
    #[arg(
        long,
        value_name = "WHEN",
        env = "SVC_LB_EXTERNAL_SNAT",
        value_enum,
        default_value_t
    )]
    external_snat: ExternalSnat,
    /// Give pods' packets to a ClusterIP this node's address as their source, too
    #[arg(long, env = "SVC_LB_MASQUERADE_ALL")]
    masquerade_all: bool,
    /// A range of pods' addresses: a client with such an address is a pod wherever its packets come in, also from
    /// another node, as with kube-proxy's detectLocalMode ClusterCIDR: outside addresses lead it to any backend, whatever
    /// their policy, and backends of this node see its own address. Pods of this node are known by their
    /// interfaces without. May be repeated, 4 times for each family
    #[arg(
        long,
        value_name = "CIDR",
        env = "SVC_LB_POD_CIDR",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    pod_cidr: Vec<IpNet>,
    /// Ports of translated sources; none that this node's own connections may have
    #[arg(
        long,
        value_name = "FIRST-LAST",
        env = "SVC_LB_SNAT_PORTS",
        value_parser = ports,
        default_value = "61000-65535"
    )]
    snat_ports: RangeInclusive<u16>,
}

/// `--external-snat`.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
enum ExternalSnat {
    /// A backend of this node sees the client's address.
    #[default]
    RemoteOnly,
    /// Every backend sees this node's address.
    Always,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Sockets")]
struct SocketArgs {
    /// Whose sockets are given a backend once, in place of each of their packets
    #[arg(
        long,
        value_name = "WHOSE",
        env = "SVC_LB_SOCKET_LB",
        value_enum,
        default_value_t
    )]
    socket_lb: SocketMode,
    /// The cgroup v2 directory of all of this node's processes, pods' included
    ///
    /// [default: the root of the hierarchy, wherever it is mounted]
    #[arg(long, value_name = "DIR", env = "SVC_LB_CGROUP")]
    cgroup: Option<PathBuf>,
}

impl From<SocketArgs> for SocketSettings {
    fn from(SocketArgs { socket_lb, cgroup }: SocketArgs) -> Self {
        Self {
            mode: socket_lb,
            cgroup,
        }
    }
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Control plane of objects that were never in a cluster")]
struct ControlPlaneArgs {
    /// Range of ClusterIPs, one for each family; packets to addresses in it that belong to no
    /// Service are dropped
    #[arg(
        long,
        value_name = "CIDR",
        env = "SVC_LB_SERVICE_CIDR",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    service_cidr: Vec<IpNet>,
    /// Ports that NodePorts are taken from
    #[arg(
        long,
        value_name = "FIRST-LAST",
        env = "SVC_LB_NODE_PORT_RANGE",
        value_parser = ports,
        default_value = "30000-32767"
    )]
    node_port_range: RangeInclusive<u16>,
    /// Addresses that Services of type LoadBalancer get; without any, they wait for one
    #[arg(
        long,
        value_name = "CIDR",
        env = "SVC_LB_LB_POOL",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    lb_pool: Vec<IpNet>,
    /// Where addresses and ports that were handed out are kept
    #[arg(
        long,
        value_name = "DIR",
        env = "SVC_LB_STATE_DIR",
        default_value = "/var/lib/svc-lb"
    )]
    state_dir: PathBuf,
}

#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Dataplane")]
struct DataplaneArgs {
    /// How tc programs are attached [default: tcx where the kernel has it (6.6), else clsact]
    #[arg(long, value_name = "HOOK", env = "SVC_LB_TC_HOOK", value_enum)]
    tc_hook: Option<TcHook>,
    /// Entries of a map, in place of the default; counts when the map is made
    #[arg(
        long,
        value_name = "MAP=ENTRIES",
        env = "SVC_LB_MAP_SIZE",
        value_delimiter = ',',
        action = ArgAction::Append
    )]
    map_size: Vec<SizeOverride>,
    #[arg(
        long,
        value_name = "STATE=DURATION",
        env = "SVC_LB_TIMEOUT",
        value_delimiter = ',',
        action = ArgAction::Append,
        help = timeouts::help(),
    )]
    timeout: Vec<StateTimeout>,
    /// Log what the programs have to say: rare events, sampled
    #[arg(long, env = "SVC_LB_DATAPATH_LOG")]
    datapath_log: bool,
}

fn table_size(text: &str) -> Result<u16> {
    let sizes = MaglevOptions::SIZES;
    match text.trim().parse() {
        Ok(size) if sizes.contains(&size) => Ok(size),
        _ => bail!(
            "a table has {} slots",
            sizes.map(|size| size.to_string()).join(", ")
        ),
    }
}

fn period(text: &str) -> Result<Duration> {
    let period = humantime::parse_duration(text)?;
    if period.is_zero() || period > LONGEST_PERIOD {
        bail!(
            "a duration of more than nothing and at most {}",
            humantime::format_duration(LONGEST_PERIOD)
        );
    }
    Ok(period)
}

fn ports(text: &str) -> Result<RangeInclusive<u16>> {
    let (first, last) = text
        .split_once('-')
        .context("write FIRST-LAST, as in 30000-32767")?;
    let range = first.trim().parse()?..=last.trim().parse()?;
    if *range.start() == 0 || range.is_empty() {
        bail!("ports go from 1 to 65535, the smaller one first");
    }
    Ok(range)
}

/// Whether it could be run with.
pub(super) fn check(args: &Args, global: &Global) -> Result<()> {
    settings(args.clone(), global).map(drop)
}

pub(super) fn run(args: Args, global: &Global, effective: &Effective) -> Result<ExitCode> {
    let mut settings = settings(args, global)?;
    settings.configz = effective.json();
    for ignored in &effective.ignored {
        warn!("{ignored}");
    }
    spare_memory();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(app::run(settings))?;
    Ok(ExitCode::SUCCESS)
}

fn settings(args: Args, global: &Global) -> Result<Settings> {
    let Args {
        manifests,
        stream,
        stream_initial_quiet,
        cluster,
        node_name,
        service_proxy_name,
        nodeport_addresses,
        external_ips,
        refusals,
        selection:
            SelectionArgs {
                lb_algorithm,
                maglev_seed,
                maglev_table_size,
            },
        health:
            HealthArgs {
                healthz_bind_address,
                metrics_bind_address,
                sync_period,
            },
        source:
            SourceArgs {
                external_snat,
                masquerade_all,
                pod_cidr,
                snat_ports,
            },
        sockets,
        control_plane:
            ControlPlaneArgs {
                service_cidr,
                node_port_range,
                lb_pool,
                state_dir,
            },
        edges,
        dataplane:
            DataplaneArgs {
                tc_hook,
                map_size,
                timeout,
                datapath_log,
            },
    } = args;
    let node_name = node_name.map_or_else(default_node_name, Ok)?;
    let mut sources = standalone_sources(manifests, stream, stream_initial_quiet);
    let others = !sources.is_empty();
    let cluster = cluster.settings(others, &node_name, service_proxy_name.as_deref());
    sources.extend(cluster.map(Spec::Kubernetes));
    if sources.is_empty() {
        bail!(NO_SOURCE);
    }
    let mut config = with_service_cidrs(Config::DEFAULT, &service_cidr)?;
    config = with_pod_cidrs(config, &pod_cidr)?;
    config.maglev_seed = text_hash(&maglev_seed);
    let bit = |on: bool, bit: u32| if on { bit } else { 0 };
    config.bits = refusals.apply(config.bits)
        | bit(
            external_ips == ExternalIps::Outside,
            config::EXTERNAL_IPS_OUTSIDE,
        )
        | bit(external_snat == ExternalSnat::Always, config::SNAT_ALWAYS)
        | bit(masquerade_all, config::MASQUERADE_ALL)
        | bit(datapath_log, config::DIAGNOSTICS);
    (config.snat_first, config.snat_last) = (*snat_ports.start(), *snat_ports.end());
    Ok(Settings {
        sources,
        node_name,
        standalone: others.then_some(standalone::Config {
            service_cidrs: service_cidr,
            node_ports: node_port_range,
            lb_pools: lb_pool,
            state_dir: Some(state_dir),
        }),
        compile: CompileOptions {
            proxy_name: service_proxy_name,
            ignore_external_ips: external_ips == ExternalIps::Off,
            algorithm: lb_algorithm.into(),
            maglev: MaglevOptions {
                seed: config.maglev_seed,
                slots: maglev_table_size,
            },
        },
        node_ports: nodeport_addresses,
        pins: global.pins(),
        sizes: map_size,
        config,
        edges: edges.settings(),
        tc: tc_hook,
        timeouts: Timeouts::with(&timeout),
        sockets: sockets.into(),
        healthz: healthz_bind_address,
        metrics: metrics_bind_address,
        configz: serde_json::Value::Null,
        sync_period,
        admin_socket: global.admin_socket.clone(),
    })
}

/// Has glibc keep one heap for all threads, and give large blocks back. A heap for each thread, which nothing here
/// is fast enough to need, took half as much memory again (`cargo xtask bench --agent`).
fn spare_memory() {
    for (setting, value) in [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, 128 << 10)] {
        // SAFETY: a setting of the allocator, made before there are threads. It is not vital.
        unsafe { libc::mallopt(setting, value) };
    }
}

fn standalone_sources(
    manifests: Vec<PathBuf>,
    stream: Vec<Target>,
    initial_quiet: Option<humantime::Duration>,
) -> Vec<Spec> {
    let stream = stream.into_iter().map(|target| Spec::Stream {
        target,
        initial_quiet: initial_quiet.map(Into::into),
    });
    let manifests = manifests.into_iter().map(Spec::Manifests);
    manifests.chain(stream).collect()
}

fn default_node_name() -> Result<String> {
    if let Ok(name) = std::env::var("NODE_NAME") {
        return Ok(name);
    }
    let name = nix::unistd::gethostname().context("read the host name; or say --node-name")?;
    // As the kubelet registers it.
    Ok(name.to_string_lossy().to_lowercase())
}

/// The programs know one service range of each family.
fn with_service_cidrs(mut config: Config, cidrs: &[IpNet]) -> Result<Config> {
    for cidr in cidrs {
        match cidr {
            IpNet::V4(cidr) if config.service_mask4.0 == 0 => {
                config.service_net4 = cidr.network().into();
                config.service_mask4 = cidr.netmask().into();
            }
            IpNet::V6(cidr) if config.service_mask6.0 == [0; 4] => {
                config.service_net6 = cidr.network().into();
                config.service_mask6 = cidr.netmask().into();
            }
            IpNet::V4(_) | IpNet::V6(_) => {
                bail!("--service-cidr {cidr}: give one range of each family at most")
            }
        }
    }
    Ok(config)
}

/// The programs know a few ranges of pods.
fn with_pod_cidrs(mut config: Config, cidrs: &[IpNet]) -> Result<Config> {
    let mut places4 = config.pod_nets4.iter_mut().zip(&mut config.pod_masks4);
    let mut places6 = config.pod_nets6.iter_mut().zip(&mut config.pod_masks6);
    for cidr in cidrs {
        if cidr.prefix_len() == 0 {
            bail!("--pod-cidr {cidr}: everyone would be a pod; give the pods' own range");
        }
        let placed = match cidr {
            IpNet::V4(cidr) => places4.next().map(|(net, mask)| {
                *net = cidr.network().into();
                *mask = cidr.netmask().into();
            }),
            IpNet::V6(cidr) => places6.next().map(|(net, mask)| {
                *net = cidr.network().into();
                *mask = cidr.netmask().into();
            }),
        };
        if placed.is_none() {
            bail!(
                "--pod-cidr {cidr}: give {} ranges of each family at most",
                config::POD_NETS
            );
        }
    }
    Ok(config)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use clap::Parser as _;
    use svc_lb_common::{Addr4, Addr6};

    use super::super::{Cli, Command};
    use super::*;
    use crate::dataplane::FlowState;

    fn parse(line: &str) -> Result<Settings> {
        let cli = Cli::try_parse_from(line.split_whitespace())?;
        let Command::Run(args) = cli.command else {
            bail!("another command");
        };
        settings(*args, &cli.global)
    }

    #[test]
    fn settings_follow_the_command_line() {
        let settings = parse(
            "svc-lb run --manifests a --manifests b --stream - --node-name n --service-cidr 10.96.0.0/16 \
             --service-cidr fd00:96::/112 --no-local-endpoint reject --map-size services=4096 --timeout tcp-established=2h,udp-opening=90s",
        )
        .unwrap();
        assert_eq!(settings.sources.len(), 3);
        let config = settings.config;
        assert_eq!(
            config.service_net4,
            Addr4::from(Ipv4Addr::new(10, 96, 0, 0))
        );
        assert_eq!(
            config.service_mask4,
            Addr4::from(Ipv4Addr::new(255, 255, 0, 0))
        );
        let mask6: Addr6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:0"
            .parse::<Ipv6Addr>()
            .unwrap()
            .into();
        assert_eq!(config.service_mask6, mask6);
        assert_eq!(settings.timeouts.of(FlowState::TcpEstablished), 7_200);
        assert_eq!(settings.timeouts.of(FlowState::UdpOpening), 90);
        assert_ne!(config.bits & config::REJECT_NO_LOCAL, 0);
        assert_eq!(config.bits & config::DIAGNOSTICS, 0);
        assert_eq!(settings.healthz, "0.0.0.0:10256".parse().unwrap());
        assert_eq!(settings.sync_period, Duration::from_secs(30));
        assert_eq!(config.bits & config::EXTERNAL_IPS_OUTSIDE, 0);
        assert_eq!(settings.node_ports, [NodePorts::All]);
    }

    /// C3, C6, E3, E4, G4: what is not served is refused as told.
    #[test]
    fn refusals_follow_the_command_line() {
        let bits = |line: &str| parse(line).unwrap().config.bits;
        let all = config::REJECT_NO_LOCAL
            | config::REJECT_UNDEFINED_PORT
            | config::DROP_UNALLOCATED
            | config::RESET_VANISHED;
        let plain = bits("svc-lb run --manifests a --node-name n");
        assert_eq!(
            plain & all,
            config::REJECT_UNDEFINED_PORT | config::DROP_UNALLOCATED
        );
        let other = bits(
            "svc-lb run --manifests a --node-name n --no-local-endpoint reject \
             --undefined-port pass --unallocated-address pass --reset-gone-backends local",
        );
        assert_eq!(
            other & all,
            config::REJECT_NO_LOCAL | config::RESET_VANISHED
        );
    }

    #[test]
    fn external_ips_and_node_ports_are_for_whom_they_are_said_to_be() {
        let outside = parse(
            "svc-lb run --manifests a --node-name n --external-ips outside \
             --nodeport-addresses primary,192.0.2.0/24",
        )
        .unwrap();
        assert_ne!(outside.config.bits & config::EXTERNAL_IPS_OUTSIDE, 0);
        assert!(!outside.compile.ignore_external_ips);
        let range = "192.0.2.0/24".parse().unwrap();
        assert_eq!(
            outside.node_ports,
            [NodePorts::Primary, NodePorts::Within(range)]
        );
        let off = parse("svc-lb run --manifests a --node-name n --external-ips off").unwrap();
        assert!(off.compile.ignore_external_ips);
        assert_eq!(off.config.bits & config::EXTERNAL_IPS_OUTSIDE, 0);
    }

    /// C8: ranges of both families, a few of them.
    #[test]
    fn pods_are_known_by_ranges_too() {
        let run = "svc-lb run --manifests a --node-name n";
        let config = |more: &str| parse(&format!("{run} {more}")).map(|settings| settings.config);
        let two =
            config("--pod-cidr 10.244.1.1/16,fd00:10:244::/48 --pod-cidr 10.8.0.0/14").unwrap();
        let ranges = |config: &Config| {
            let at = |n: usize| (config.pod_nets4[n], config.pod_masks4[n]);
            [at(0), at(1), at(2)].map(|(net, mask)| {
                (
                    Ipv4Addr::from(net).to_string(),
                    Ipv4Addr::from(mask).to_string(),
                )
            })
        };
        let pair = |net: &str, mask: &str| (net.to_owned(), mask.to_owned());
        assert_eq!(
            ranges(&two),
            [
                pair("10.244.0.0", "255.255.0.0"),
                pair("10.8.0.0", "255.252.0.0"),
                pair("0.0.0.0", "0.0.0.0")
            ]
        );
        assert_eq!(Ipv6Addr::from(two.pod_masks6[0]).to_bits(), !0 << 80);
        let many = "--pod-cidr 10.0.0.0/24,10.0.1.0/24,10.0.2.0/24,10.0.3.0/24,10.0.4.0/24";
        let error = format!("{:#}", config(many).unwrap_err());
        assert!(
            error.contains("10.0.4.0/24") && error.contains("4 ranges"),
            "{error}"
        );
        let error = format!("{:#}", config("--pod-cidr ::/0").unwrap_err());
        assert!(error.contains("everyone"), "{error}");
    }

    /// F9, F10: what every node must be told alike.
    #[test]
    fn selection_follows_the_command_line() {
        let plain = parse("svc-lb run --manifests a").unwrap();
        assert_eq!(plain.compile.algorithm, Algorithm::Random);
        assert_eq!(plain.compile.maglev.slots, 65_521);
        let seeded = parse(
            "svc-lb run --manifests a --lb-algorithm maglev --maglev-seed s3cret --maglev-table-size 4093",
        )
        .unwrap();
        assert_eq!(seeded.compile.algorithm, Algorithm::Maglev);
        assert_eq!(seeded.compile.maglev.slots, 4_093);
        assert_eq!(seeded.compile.maglev.seed, seeded.config.maglev_seed);
        assert_ne!(seeded.config.maglev_seed, plain.config.maglev_seed);
    }

    /// A cluster is watched where one is named, and nothing else then.
    #[test]
    fn clusters_are_watched() {
        let settings = parse(
            "svc-lb run --kubeconfig k --api-server https://192.0.2.1:6443,https://[2001:db8::1]:6443 --node-name n \
             --service-proxy-name p --api-list stream",
        )
        .unwrap();
        let [Spec::Kubernetes(cluster)] = &*settings.sources else {
            panic!("{:?}", settings.sources);
        };
        assert_eq!(cluster.access.servers.len(), 2);
        assert_eq!(cluster.node_name, "n");
        assert_eq!(cluster.proxy_name.as_deref(), Some("p"));
        assert!(cluster.streaming_lists);
        assert!(settings.standalone.is_none());
        for line in [
            "svc-lb run --source kubernetes --stream -",
            "svc-lb run --kubeconfig k --manifests a",
            "svc-lb run --kubeconfig k --api-server 192.0.2.1",
        ] {
            parse(line).unwrap_err();
        }
    }

    /// I2: whose sockets are given backends.
    #[test]
    fn sockets_follow_the_command_line() {
        let plain = parse("svc-lb run --manifests a").unwrap().sockets;
        assert_eq!(plain.mode, SocketMode::TcpHostUdp);
        assert_eq!(plain.cgroup, None);
        let line = "svc-lb run --manifests a --socket-lb host-only --cgroup /sys/fs/cgroup/node";
        let settings = parse(line).unwrap().sockets;
        assert_eq!(settings.mode, SocketMode::HostOnly);
        assert_eq!(settings.cgroup, Some("/sys/fs/cgroup/node".into()));
        let same = parse("svc-lb run --manifests a --socket-lb tcp,host-udp").unwrap();
        assert_eq!(same.sockets.mode, SocketMode::TcpHostUdp);
    }

    #[test]
    fn wrong_command_lines_say_what_is_wrong() {
        let error = |line| format!("{:#}", parse(line).unwrap_err());
        assert!(error("svc-lb run").contains("--manifests"));
        let two = "svc-lb run --manifests a --service-cidr 10.0.0.0/16 --service-cidr 10.1.0.0/16";
        assert!(error(two).contains("one range of each family"));
        let ports = "svc-lb run --manifests a --node-port-range 40000-30000";
        assert!(
            error(ports).contains("smaller one first"),
            "{}",
            error(ports)
        );
        let healthz = "svc-lb run --manifests a --healthz-bind-address 10256";
        assert!(error(healthz).contains("ADDRESS:PORT"));
        let table = "svc-lb run --manifests a --maglev-table-size 1000";
        assert!(error(table).contains("1021, 4093, 16381, 65521"));
        let period = "svc-lb run --manifests a --sync-period 0s";
        assert!(error(period).contains("more than nothing"));
        let timeout = "svc-lb run --manifests a --timeout tcp=1h";
        assert!(error(timeout).contains("tcp-established"));
        let size = "svc-lb run --manifests a --map-size flows=1";
        assert!(error(size).contains("established4"));
        let addresses = "svc-lb run --manifests a --nodeport-addresses eth0";
        assert!(error(addresses).contains("primary or a range"));
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
