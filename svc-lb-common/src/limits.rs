//! Map names, default sizes and the version of the layout.

/// Version of every record in this crate. Pins of another version are not adopted. Raise it with
/// any change of a record, a map's kind or the meaning of a field.
pub const LAYOUT_VERSION: u32 = 4;

/// `guard`: 2^20 addresses in 512 KiB.
pub const GUARD_WORDS: u32 = 1 << 16;
/// `guard_direct`: one u64 to a position.
pub const GUARD_DIRECT: u32 = 4_096;
/// `frontends4`, `frontends6`: addresses times ports of 10,000 services with room to spare.
pub const FRONTENDS: u32 = 65_536;
/// `services`: service ports of both families.
pub const SERVICES: u32 = 65_536;
/// `slots`, in words of [`crate::service::SLOTS_PER_WORD`]: twice 100,000 endpoints in two sets,
/// for both the old and the new range of a service while it is republished, or as much again in
/// Maglev tables (16 of the largest size altogether).
pub const SLOT_WORDS: u32 = 524_288;
/// `backends4`, `backends6`.
pub const BACKENDS: u32 = 262_144;
/// `opening4`, `opening6`: entries; a flow has two. Default for small machines, see
/// `svc_lb::dataplane`.
pub const OPENING: u32 = 131_072;
/// `established4`, `established6`: entries; a flow has two.
pub const ESTABLISHED: u32 = 524_288;
/// `streams4`, `streams6`: entries; a flow has two.
pub const STREAMS: u32 = 131_072;
/// `affinity4`, `affinity6`: clients times affine service ports (Calico's default is the same).
pub const AFFINITY: u32 = 65_536;
/// `fragments4`, `fragments6`: datagrams whose fragments may still come.
pub const FRAGMENTS: u32 = 32_768;
/// `sockets4`, `sockets6`: entries; a TCP connection or connected UDP socket has one, other UDP sockets two
/// for each frontend they send to.
pub const SOCKETS: u32 = 65_536;
/// `source_ranges4`, `source_ranges6`: ranges times service ports that have them.
pub const SOURCE_RANGES: u32 = 65_536;
/// `edges`: interfaces.
pub const EDGES: u32 = 4_096;

/// `links`: interfaces, pods' included.
pub const LINKS: u32 = 4_096;

/// `vanished4`, `vanished6`: pods; those of several days where pods come and go all the time.
pub const VANISHED: u32 = 4_096;

/// Names of the maps; at most 15 characters, the kernel cuts the rest.
pub mod name {
    /// Hash of address to hint bits; `guard` module.
    pub const GUARD: &str = "guard";
    /// Bitmap of NodePorts.
    pub const GUARD_PORT: &str = "guard_port";
    /// Addresses that direct flows with a translated source port go to; set by the programs.
    pub const GUARD_DIRECT: &str = "guard_direct";
    /// Frontends by family.
    pub const FRONTENDS: [&str; 2] = ["frontends4", "frontends6"];
    /// Services, both families.
    pub const SERVICES: &str = "services";
    /// Backend ids, both families.
    pub const SLOTS: &str = "slots";
    /// Backends by family.
    pub const BACKENDS: [&str; 2] = ["backends4", "backends6"];
    /// Flows of which the client has not proved that it gets the backend's answers.
    pub const OPENING: [&str; 2] = ["opening4", "opening6"];
    /// TCP connections.
    pub const ESTABLISHED: [&str; 2] = ["established4", "established6"];
    /// UDP streams.
    pub const STREAMS: [&str; 2] = ["streams4", "streams6"];
    /// Session affinity by family.
    pub const AFFINITY: [&str; 2] = ["affinity4", "affinity6"];
    /// Ports of fragmented datagrams, by family.
    pub const FRAGMENTS: [&str; 2] = ["fragments4", "fragments6"];
    /// Whom services admit at load balancer addresses, by family.
    pub const SOURCE_RANGES: [&str; 2] = ["source_ranges4", "source_ranges6"];
    /// Which backend stands for which frontend to a socket, by family.
    pub const SOCKETS: [&str; 2] = ["sockets4", "sockets6"];
    /// Sockets that were given a backend, by its id.
    pub const SOCKET_HITS: [&str; 2] = ["socket_hits4", "socket_hits6"];
    /// Edges by interface index.
    pub const EDGES: &str = "edges";
    /// What leaves through an interface, by its index.
    pub const LINKS: &str = "links";
    /// Pods of this node that are gone, by family.
    pub const VANISHED: [&str; 2] = ["vanished4", "vanished6"];
    /// Packets by hook and outcome.
    pub const COUNTERS: &str = "counters";
    /// Token bucket of generated packets.
    pub const BUCKET: &str = "bucket";

    /// Every map that outlives the agent, in pin order.
    pub const PINNED: [&str; 33] = [
        GUARD,
        GUARD_PORT,
        GUARD_DIRECT,
        FRONTENDS[0],
        FRONTENDS[1],
        SERVICES,
        SLOTS,
        BACKENDS[0],
        BACKENDS[1],
        OPENING[0],
        OPENING[1],
        ESTABLISHED[0],
        ESTABLISHED[1],
        STREAMS[0],
        STREAMS[1],
        AFFINITY[0],
        AFFINITY[1],
        FRAGMENTS[0],
        FRAGMENTS[1],
        SOURCE_RANGES[0],
        SOURCE_RANGES[1],
        SOCKETS[0],
        SOCKETS[1],
        SOCKET_HITS[0],
        SOCKET_HITS[1],
        EDGES,
        LINKS,
        VANISHED[0],
        VANISHED[1],
        COUNTERS,
        BUCKET,
        MET[0],
        MET[1],
    ];

    /// What is known of the packet on its walk; per CPU.
    pub const MET: [&str; 2] = ["met4", "met6"];

    const _: () = {
        let mut i = 0;
        while i < PINNED.len() {
            assert!(PINNED[i].len() <= 15);
            i += 1;
        }
    };
}
