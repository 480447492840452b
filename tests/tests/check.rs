//! `svc-lb check`: what it finds in a network namespace that was spoilt on purpose.

use std::fs;
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use aya_obj::generated::bpf_prog_type;
use nix::sched::{CloneFlags, unshare};
use serde_json::Value;
use svc_lb::dataplane::sys::{self, AttachPoint, insn};
use svc_lb_tests::lab::{agent, privileged};

/// A namespace of this thread and its children.
fn alone(test: impl FnOnce() -> Result<()> + Send + 'static) {
    if !privileged() {
        return;
    }
    let body = || {
        unshare(CloneFlags::CLONE_NEWNET).context("a new namespace; this test needs root")?;
        test()
    };
    thread::spawn(body)
        .join()
        .expect("the test ran")
        .expect("test");
}

fn command(line: &str) -> Result<()> {
    let mut words = line.split_whitespace();
    let program = words.next().context("a command")?;
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| line.to_owned())?;
    if !output.status.success() {
        bail!("{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Sets one of this namespace's settings.
fn sysctl(path: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{path}"), value).with_context(|| format!("set {path}"))
}

/// Exit code and findings, by subject.
struct Report {
    code: Option<i32>,
    json: Value,
}

impl Report {
    fn of(args: &[&str]) -> Result<Self> {
        let output = Command::new(agent::binary()?)
            .args([
                "check",
                "-o",
                "json",
                "--uplink",
                "up*",
                "--pod-interface",
                "pod*",
            ])
            .args(args)
            .output()?;
        let json = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        Ok(Self {
            code: output.status.code(),
            json,
        })
    }

    /// Level and text of the finding about `subject` whose text holds `part`.
    fn level(&self, subject: &str, part: &str) -> Option<&str> {
        self.json
            .get("findings")?
            .as_array()?
            .iter()
            .find_map(|finding| {
                let text = finding.to_string();
                (finding["subject"] == subject && text.contains(part))
                    .then(|| finding["level"].as_str())
                    .flatten()
            })
    }
}

#[test]
fn a_sound_node_is_usable() {
    alone(|| {
        for line in [
            "ip link set lo up",
            "ip link add up0 type veth peer name net0",
            "ip link add pod1 type veth peer name eth0",
        ] {
            command(line)?;
        }
        sysctl("net/ipv4/ip_forward", "1")?;
        sysctl("net/ipv6/conf/all/forwarding", "1")?;
        let report = Report::of(&[])?;
        ensure!(report.code == Some(0), "{:#}", report.json);
        ensure!(report.json["verdict"] != "degraded");
        for program in ["tc_ingress", "tc_egress", "xdp_ingress"] {
            ensure!(
                report.level(program, "loads") == Some("ok"),
                "{:#}",
                report.json
            );
        }
        ensure!(report.level("uplinks", "up0") == Some("ok"));
        ensure!(report.level("pod interfaces", "pod1") == Some("ok"));
        Ok(())
    });
}

#[test]
fn what_is_wrong_is_found_and_explained() {
    alone(|| {
        for line in [
            "ip link add up0 type veth peer name net0",
            "ip tuntap add dev up1 mode tun",
            "nft add table inet wall",
            "nft add chain inet wall through { type filter hook forward priority 0 ; policy drop ; }",
            "tc qdisc add dev up0 clsact",
        ] {
            command(line)?;
        }
        sysctl("net/ipv4/conf/up0/rp_filter", "1")?;
        let up0 = nix::net::if_::if_nametoindex("up0")?;
        let other = sys::prog_load(
            bpf_prog_type::BPF_PROG_TYPE_SCHED_CLS,
            &[insn::mov(0, 0), insn::exit()],
        )?;
        let _link = sys::link_create(other.as_fd(), up0, AttachPoint::TcxIngressFirst)?;

        let report = Report::of(&[])?;
        ensure!(report.code == Some(4), "{:#}", report.json);
        ensure!(report.json["verdict"] == "unusable");
        for (subject, part, level) in [
            (
                "net.ipv4.ip_forward",
                "sysctl -w net.ipv4.ip_forward=1",
                "unusable",
            ),
            ("rp_filter", "up0", "note"),
            ("FORWARD policy", "inet wall through", "degraded"),
            ("interface up1", "no Ethernet header", "degraded"),
            ("programs on up0", "tcx ingress", "note"),
        ] {
            ensure!(
                report.level(subject, part) == Some(level),
                "{subject}: {:#}",
                report.json
            );
        }

        sysctl("net/ipv4/ip_forward", "1")?;
        let report = Report::of(&[])?;
        ensure!(report.code == Some(3), "{:#}", report.json);
        ensure!(report.level("net.ipv4.ip_forward", "1") == Some("ok"));
        Ok(())
    });
}
