//! What the running kernel can do, found out by trying: nothing of the node is touched.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::thread;

use aya::maps::MapType;
use aya::programs::{ProgramType, SchedClassifier, TcAttachType};
use aya::sys::{is_map_supported, is_program_supported};
use aya::{EbpfLoader, VerifierLogLevel};
use aya_obj::generated::{BPF_F_MMAPABLE, bpf_func_id, bpf_map_type, bpf_prog_type};
use nix::sched::{CloneFlags, unshare};
use svc_lb_common::config::Config;
use svc_lb_common::limits::name;

use super::attach::TcHook;
use super::clsact::{self, Direction};
use super::loader::{self, LoadError};
use super::sizes::MapSizes;
use super::sockets::{Place, SocketSettings};
use super::sys::{self, AttachPoint, insn, map::MapInfo};
use crate::node::{self, NodeError};
use crate::observe::finding::{Finding, Level};

/// The oldest kernel that is tested.
const OLDEST: aya::util::KernelVersion = aya::util::KernelVersion::new(5, 10, 0);
/// `BPF_F_IPV6` of `bpf_l4_csum_replace`, Linux 6.16.
const BPF_F_IPV6: i32 = 1 << 7;
/// The size of the field that `bpf_l4_csum_replace` changes.
const FIELD_SIZE: i32 = 2;

/// Whether tcx links exist (6.6): by asking for the programs of the loopback interface.
#[must_use]
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// How tc programs are attached on this kernel.
#[must_use]
pub fn tc_hook() -> TcHook {
    if has_tcx() {
        TcHook::Tcx
    } else {
        TcHook::Clsact
    }
}

/// Whether `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16, backported to some): it checks its
/// flags before anything else, then finds the odd offset.
pub fn has_csum_ipv6() -> io::Result<bool> {
    const EFAULT: i32 = -libc::EFAULT;
    let instructions = [
        // r1 is the packet already.
        insn::mov(2, 0xffff),
        insn::mov(3, 0),
        insn::mov(4, 0),
        insn::mov(5, BPF_F_IPV6 | FIELD_SIZE),
        insn::call(bpf_func_id::BPF_FUNC_l4_csum_replace),
        insn::exit(),
    ];
    let program = sys::prog_load(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS, &instructions)?;
    let verdict = sys::run_once(program.as_fd())?;
    Ok(verdict.cast_signed() == EFAULT)
}

/// What the kernel has and lacks, and what follows.
#[must_use]
pub fn kernel() -> Vec<Finding> {
    let mut findings = vec![version(), jit()];
    let array = map(bpf_map_type::BPF_MAP_TYPE_ARRAY, 0);
    if let Err(error) = sys::map::map_create(array) {
        findings.push(
            Finding::new(
                Level::Unusable,
                "bpf(2)",
                error.to_string(),
                "no program can be loaded",
            )
            .fix("run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"),
        );
        return findings;
    }
    findings.push(Finding::ok("bpf(2)", "permitted"));
    findings.push(supported(
        "arrays in the agent's memory (5.5)",
        sys::map::map_create(map(bpf_map_type::BPF_MAP_TYPE_ARRAY, BPF_F_MMAPABLE)).map(|_| true),
        Level::Unusable,
        "services cannot be published in one step",
    ));
    for (kind, subject, level, effect) in [
        (
            MapType::LruHash,
            "LRU hash maps",
            Level::Unusable,
            "no flow can be tracked",
        ),
        (
            MapType::PerCpuArray,
            "per-CPU arrays",
            Level::Unusable,
            "nothing can be counted",
        ),
        (
            MapType::RingBuf,
            "ring buffers (5.8)",
            Level::Degraded,
            "no --datapath-log",
        ),
    ] {
        findings.push(supported(
            subject,
            is_map_supported(kind).map_err(io::Error::other),
            level,
            effect,
        ));
    }
    findings.push(supported(
        "map batches (5.6)",
        sys::map::has_batches(),
        Level::Note,
        "large changes of the maps take longer",
    ));
    findings.push(supported(
        "tc programs",
        is_program_supported(ProgramType::SchedClassifier).map_err(io::Error::other),
        Level::Unusable,
        "no packet can be translated",
    ));
    findings.push(supported(
        "XDP programs",
        is_program_supported(ProgramType::Xdp).map_err(io::Error::other),
        Level::Degraded,
        "uplinks are served by tc alone",
    ));
    findings.push(supported(
        "socket address programs",
        is_program_supported(ProgramType::CgroupSockAddr).map_err(io::Error::other),
        Level::Note,
        "nothing yet: a later version translates at the socket with them",
    ));
    findings.push(supported(
        "IPv6 checksums over skbs (6.16)",
        has_csum_ipv6(),
        Level::Note,
        "checksums of translated IPv6 packets are updated by a slower path",
    ));
    findings.push(supported(
        "tcx links (6.6)",
        Ok(has_tcx()),
        Level::Degraded,
        "tc programs are attached as clsact filters: others may go ahead of them",
    ));
    findings.push(sockets());
    findings.extend(links());
    findings
}

/// Whether the kernel takes the programs: loads them over small maps of their own.
#[must_use]
pub fn programs() -> Vec<Finding> {
    const SUBJECT: &str = "the programs";
    let loaded = match load_unpinned() {
        Ok(loaded) => loaded,
        Err(error) => {
            return vec![Finding::new(
                Level::Unusable,
                SUBJECT,
                error.to_string(),
                "nothing works",
            )];
        }
    };
    let mut findings = Vec::new();
    if let Some(error) = &loaded.xdp_refused {
        findings.push(Finding::new(
            Level::Degraded,
            "xdp_ingress",
            error.to_string(),
            "uplinks are served by tc alone",
        ));
    }
    if let Some(error) = &loaded.sockets_refused {
        findings.push(Finding::new(
            Level::Degraded,
            "socket hooks",
            error.to_string(),
            "sockets are served packet by packet",
        ));
    }
    findings.extend(
        loaded
            .verified_instructions()
            .map(|(program, instructions)| {
                Finding::ok(
                    program,
                    format!("loads; {instructions} instructions verified"),
                )
            }),
    );
    if findings.is_empty() {
        findings.push(Finding::ok(SUBJECT, "load"));
    }
    findings
}

fn load_unpinned() -> Result<loader::Programs, LoadError> {
    loader::allow_locked_memory();
    let object = loader::object()?;
    let sizes = MapSizes::smallest();
    let config = Config {
        guard_words: sizes
            .get(name::GUARD)
            .unwrap_or(Config::DEFAULT.guard_words),
        ..Config::DEFAULT
    };
    loader::load_programs(true, |level: VerifierLogLevel| {
        let mut loader = EbpfLoader::new();
        loader
            .verifier_log_level(level)
            .override_global(loader::CONFIG, &config, true);
        for (name, entries) in sizes.iter() {
            loader.map_max_entries(name, entries);
        }
        loader
            .load(object)
            .map_err(|error| LoadError::Ebpf(Box::new(error)))
    })
    .map(|(programs, _)| programs)
}

/// Where the socket hooks would be, without further settings.
fn sockets() -> Finding {
    const SUBJECT: &str = "socket hooks";
    match Place::find(&SocketSettings::default()) {
        Err(reason) => Finding::new(
            Level::Degraded,
            SUBJECT,
            reason.to_string(),
            "sockets are served packet by packet",
        ),
        Ok(place) => {
            let found = format!("at {}", place.cgroup().display());
            match place.shortfalls().as_slice() {
                [] => Finding::ok(SUBJECT, found),
                less => Finding::new(Level::Note, SUBJECT, found, less.join("; ")),
            }
        }
    }
}

fn version() -> Finding {
    const SUBJECT: &str = "kernel";
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    match aya::util::KernelVersion::current() {
        Ok(version) if version < OLDEST => Finding::new(
            Level::Degraded,
            SUBJECT,
            release,
            "older than 5.10, the oldest that is tested",
        ),
        Ok(_) => Finding::ok(SUBJECT, release),
        Err(error) => Finding::new(Level::Note, SUBJECT, error.to_string(), "unknown version"),
    }
}

fn jit() -> Finding {
    const SUBJECT: &str = "BPF compiler";
    match fs::read_to_string("/proc/sys/net/core/bpf_jit_enable") {
        Ok(value) if value.trim() == "0" => Finding::new(
            Level::Degraded,
            SUBJECT,
            "off",
            "programs are interpreted, several times slower",
        )
        .fix("sysctl -w net.core.bpf_jit_enable=1"),
        Ok(_) => Finding::ok(SUBJECT, "on"),
        // The file shows itself in the first network namespace only.
        Err(error) => Finding::ok(SUBJECT, format!("unknown: {error}")),
    }
}

fn supported(subject: &str, found: io::Result<bool>, level: Level, effect: &str) -> Finding {
    match found {
        Ok(true) => Finding::ok(subject, "yes"),
        Ok(false) => Finding::new(level, subject, "no", effect),
        Err(error) => Finding::new(level, subject, format!("no: {error}"), effect),
    }
}

fn map(kind: bpf_map_type, flags: u32) -> MapInfo {
    MapInfo {
        kind: kind as u32,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        flags,
    }
}

/// Tries to attach, to the loopback interface of a network namespace of its own.
fn links() -> Vec<Finding> {
    let attempt = || -> Result<(io::Result<()>, io::Result<()>), NodeError> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NodeError::Socket(error.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(NodeError::Socket)?;
        runtime.block_on(async {
            let netlink = node::requests()?;
            Ok((attach_clsact(&netlink).await, attach_xdp()))
        })
    };
    let result = thread::spawn(attempt).join();
    let (clsact, xdp) = match result {
        Ok(Ok(results)) => results,
        Ok(Err(error)) => {
            return vec![Finding::new(
                Level::Note,
                "clsact filters and XDP links",
                error.to_string(),
                "not tried",
            )];
        }
        Err(_) => return Vec::new(),
    };
    let without_tcx = if has_tcx() {
        Level::Note
    } else {
        Level::Unusable
    };
    vec![
        supported(
            "clsact filters",
            clsact.map(|()| true),
            without_tcx,
            "needed on kernels without tcx: CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF",
        ),
        supported(
            "XDP links (5.9)",
            xdp.map(|()| true),
            Level::Degraded,
            "uplinks are served by tc alone",
        ),
    ]
}

const LOOPBACK: u32 = 1;

async fn attach_clsact(netlink: &rtnetlink::Handle) -> io::Result<()> {
    let program = passing(bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS)?;
    let attached = async {
        clsact::add_qdisc(netlink, LOOPBACK).await?;
        clsact::set_filter(netlink, LOOPBACK, Direction::Egress, program.as_fd()).await
    };
    attached.await.map_err(io::Error::other)
}

fn attach_xdp() -> io::Result<()> {
    let program = passing(bpf_prog_type::BPF_PROG_TYPE_XDP)?;
    sys::link_create(program.as_fd(), LOOPBACK, AttachPoint::XdpGeneric)?;
    Ok(())
}

/// A program that lets every packet pass.
fn passing(kind: bpf_prog_type) -> io::Result<OwnedFd> {
    const XDP_PASS: i32 = 2;
    const TC_ACT_OK: i32 = 0;
    let verdict = if kind == bpf_prog_type::BPF_PROG_TYPE_XDP {
        XDP_PASS
    } else {
        TC_ACT_OK
    };
    sys::prog_load(kind, &[insn::mov(0, verdict), insn::exit()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_probe_says_why() {
        let finding = supported(
            "x",
            Err(io::Error::other("because")),
            Level::Degraded,
            "less",
        );
        assert_eq!(finding.found, "no: because");
        assert_eq!(finding.level, Level::Degraded);
        assert_eq!(finding.effect.as_deref(), Some("less"));
    }
}
