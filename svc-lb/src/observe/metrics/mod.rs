//! What `/metrics` tells Prometheus: every metric is declared here, once, with what it is for.
//!
//! `docs/metrics.md` is written from the same declarations, and a scrape that shows a metric that is not
//! declared, or not all that are, fails a test. Names are kube-proxy's where the meaning is the same
//! (SEMANTICS H4), so that its dashboards and alerts go on working.

mod expose;
mod sync;

use std::fmt::Write as _;

pub use self::expose::{Facts, text};
pub use self::sync::SyncFigures;

/// The kind of a metric.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Goes up only, from 0 at the agent's start or, what programs count, at the maps' making.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Observations by size.
    Histogram,
}

impl Kind {
    /// As Prometheus names it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug)]
pub struct Metric {
    /// As it is scraped; counters end in `_total`.
    pub name: &'static str,
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// Names of its labels.
    pub labels: &'static [&'static str],
    /// What it says, and what to do about it: a sentence or two.
    pub help: &'static str,
}

impl Metric {
    /// As Prometheus' library wants it, which adds the ending itself.
    fn bare_name(&self) -> &'static str {
        self.name.strip_suffix("_total").unwrap_or(self.name)
    }

    /// As Prometheus' library wants it, which adds a full stop.
    fn bare_help(&self) -> &'static str {
        self.help.strip_suffix('.').unwrap_or(self.help)
    }
}

macro_rules! metrics {
    ($( $(#[doc = $doc:literal])+ $ident:ident = $kind:ident $name:literal [$($label:literal),*]; )*) => {
        $(
            $(#[doc = $doc])+
            const $ident: Metric = Metric {
                name: $name,
                kind: Kind::$kind,
                labels: &[$($label),*],
                help: concat!($($doc),+).trim_ascii(),
            };
        )*

        /// All of them, in the order of the documentation.
        pub const METRICS: &[Metric] = &[$($ident),*];
    };
}

metrics! {
    /// Packets by hook and by what became of them. fate="drop" is lost traffic: docs/outcomes.md says what each outcome means and what to do.
    PACKETS = Counter "svc_lb_packets_total" ["hook", "outcome", "fate"];
    /// What happened to flows beside a packet's fate; docs/outcomes.md has the list.
    EVENTS = Counter "svc_lb_events_total" ["event"];
    /// Entries in a map, where that can be told; of maps that evict, as of the latest pass.
    MAP_ENTRIES = Gauge "svc_lb_map_entries" ["map"];
    /// Entries that a map has room for. Compare with svc_lb_map_entries; `svc-lb run --map-size` makes room.
    MAP_CAPACITY = Gauge "svc_lb_map_capacity" ["map"];
    /// Kernel memory of a map.
    MAP_BYTES = Gauge "svc_lb_map_memory_bytes" ["map"];
    /// Entries that the kernel evicted from a full map, estimated. In established4/6 and streams4/6 these were living flows: enlarge the map.
    MAP_EVICTIONS = Counter "svc_lb_map_evictions_total" ["map"];
    /// Flows and affinities that timed out and were collected, by the state in which they did.
    COLLECTED = Counter "svc_lb_collected_total" ["map", "state"];
    /// Services by what became of them: known, programmed in part or in full, or not programmed. `svc-lb status --services` says why not.
    SERVICES = Gauge "svc_lb_services" ["state"];
    /// Service ports that are programmed, both families.
    SERVICE_PORTS = Gauge "svc_lb_service_ports" [];
    /// Objects that found no room in a map or lost an address to another Service. `svc-lb status` names them.
    REFUSALS = Gauge "svc_lb_refusals" [];
    /// Writes to the maps.
    WRITES = Counter "svc_lb_map_writes_total" [];
    /// Attempts to write the maps that failed; each is tried again. `svc-lb status` has the reason.
    WRITE_FAILURES = Counter "svc_lb_sync_failures_total" [];
    /// Comparisons of the maps with what was written to them.
    AUDITS = Counter "svc_lb_audits_total" [];
    /// Elements of maps that were not as they were written, and were written again. Any is a bug or somebody else's write: `svc-lb verify` and the log name them.
    REPAIRED = Counter "svc_lb_map_repairs_total" ["map"];
    /// 1 while something that is desired is not in the maps.
    PENDING = Gauge "svc_lb_sync_pending" [];
    /// 1 when every source's first list is programmed and the interfaces are attached.
    READY = Gauge "svc_lb_ready" [];
    /// Interfaces with programs, by kind.
    EDGES = Gauge "svc_lb_edges" ["kind"];
    /// Interfaces that were asked for and cannot be edges. Their traffic is not balanced: `svc-lb status` says why.
    EDGES_REFUSED = Gauge "svc_lb_edges_refused" [];
    /// 1 while a source's current list is complete. 0 for long means that its other end does not answer.
    SOURCE_LISTED = Gauge "svc_lb_source_listed" ["source"];
    /// Changes that a source sent.
    SOURCE_CHANGES = Counter "svc_lb_source_changes_total" ["source"];
    /// Values of a source that could not be read; what they name stays as it was.
    SOURCE_MALFORMED = Counter "svc_lb_source_malformed_total" ["source"];
    /// Problems of a source that stand.
    SOURCE_PROBLEMS = Gauge "svc_lb_source_problems" ["source"];
    /// Seconds that compiling and writing one set of changes took.
    SYNC_DURATION = Histogram "kubeproxy_sync_proxy_rules_duration_seconds" [];
    /// The same, of first lists.
    SYNC_FULL = Histogram "kubeproxy_sync_full_proxy_rules_duration_seconds" [];
    /// The same, of all later changes.
    SYNC_PARTIAL = Histogram "kubeproxy_sync_partial_proxy_rules_duration_seconds" [];
    /// When everything that was known was written for the last time, in seconds since 1970.
    SYNC_LAST = Gauge "kubeproxy_sync_proxy_rules_last_timestamp_seconds" [];
    /// When a change came in for the last time, in seconds since 1970. Much later than the last sync means that writing fails.
    SYNC_LAST_QUEUED = Gauge "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds" [];
    /// Changes of Services.
    SERVICE_CHANGES = Counter "kubeproxy_sync_proxy_rules_service_changes_total" [];
    /// Changes of Services that are not written yet.
    SERVICE_CHANGES_PENDING = Gauge "kubeproxy_sync_proxy_rules_service_changes_pending" [];
    /// Changes of EndpointSlices and Endpoints.
    ENDPOINT_CHANGES = Counter "kubeproxy_sync_proxy_rules_endpoint_changes_total" [];
    /// Changes of EndpointSlices and Endpoints that are not written yet.
    ENDPOINT_CHANGES_PENDING = Gauge "kubeproxy_sync_proxy_rules_endpoint_changes_pending" [];
    /// Seconds from a change in the cluster, by the time that its EndpointSlice's annotation tells, until it was written here.
    NETWORK_PROGRAMMING = Histogram "kubeproxy_network_programming_duration_seconds" [];
    /// Answers of /healthz by status code.
    HEALTHZ = Counter "kubeproxy_proxy_healthz_total" ["code"];
    /// Answers of /livez by status code.
    LIVEZ = Counter "kubeproxy_proxy_livez_total" ["code"];
    /// 1, with the versions as labels.
    BUILD_INFO = Gauge "svc_lb_build_info" ["version", "layout", "kernel"];
    /// Seconds of CPU that the agent used.
    CPU = Counter "process_cpu_seconds_total" [];
    /// The agent's memory that is in RAM; without the maps, which are the kernel's.
    RESIDENT = Gauge "process_resident_memory_bytes" [];
    /// The agent's address space.
    VIRTUAL = Gauge "process_virtual_memory_bytes" [];
    /// When the agent was started, in seconds since 1970.
    START_TIME = Gauge "process_start_time_seconds" [];
    /// Descriptors that the agent has open.
    OPEN_FDS = Gauge "process_open_fds" [];
    /// Descriptors that the agent may open.
    MAX_FDS = Gauge "process_max_fds" [];
}

/// `docs/metrics.md`.
#[must_use]
pub fn documentation() -> String {
    let mut text = "# Metrics\n\n\
        `svc-lb run` serves them at `http://127.0.0.1:10249/metrics` (`--metrics-bind-address`), as text for Prometheus.\n\
        Names are kube-proxy's where the meaning is the same. This page is written from `svc-lb/src/observe/metrics`;\n\
        `SVC_LB_BLESS=1 cargo test -p svc-lb --test docs` does it.\n\n\
        | metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    for metric in METRICS {
        let labels: Vec<_> = metric.labels.iter().map(|l| format!("`{l}`")).collect();
        // Writing to a String does not fail.
        let _written = writeln!(
            text,
            "| `{}` | {} | {} | {} |",
            metric.name,
            metric.kind.name(),
            labels.join(", "),
            metric.help
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_prometheus_names() {
        let mut names = BTreeSet::new();
        for metric in METRICS {
            assert!(names.insert(metric.name), "{} twice", metric.name);
            assert_eq!(
                metric.kind == Kind::Counter,
                metric.name.ends_with("_total"),
                "{}",
                metric.name
            );
            assert!(metric.help.ends_with('.'), "{}", metric.name);
            assert!(!metric.help.contains('|'), "{}", metric.name);
        }
    }
}
