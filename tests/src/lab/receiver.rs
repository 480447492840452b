//! The other end of a veth whose near end sends by XDP.
//!
//! A veth hands on what XDP sends only if its peer runs an XDP program itself: a switch's port has no such
//! limit, so the router's gets one that passes everything.

use anyhow::{Context as _, Result};
use aya::programs::{Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use svc_lb_common::limits::name;

use super::topology::{Lab, NodeName};
use crate::prog::rig::object;

/// Takes what node-a's uplink sends by XDP, for as long as it lives.
#[derive(Debug)]
pub struct Receiver {
    _programs: Ebpf,
}

impl Receiver {
    /// Starts taking: our own program, which passes everything while its maps are empty.
    pub fn start(lab: &Lab) -> Result<Self> {
        let bytes = std::fs::read(object()).context("read the object; cargo xtask build")?;
        let mut loader = EbpfLoader::new();
        for names in [
            name::OPENING,
            name::ESTABLISHED,
            name::AFFINITY,
            name::BACKENDS,
        ] {
            for name in names {
                loader.map_max_entries(name, 64);
            }
        }
        let mut programs = loader.load(&bytes).context("make the maps")?;
        let program: &mut Xdp = programs
            .program_mut("xdp_ingress")
            .context("the object has no XDP program")?
            .try_into()?;
        program.load().context("load the XDP program")?;
        lab.router()
            .run(|| program.attach(NodeName::A.as_str(), XdpMode::Driver))
            .context("attach to the router's port")?;
        Ok(Self {
            _programs: programs,
        })
    }
}
