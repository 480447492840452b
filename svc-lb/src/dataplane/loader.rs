//! Loads the object over the pinned maps, after making sure that they are the maps it was built for.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use aya::maps::{Array, Map, MapData, MapError, MapInfo};
use aya::programs::{CgroupSockAddr, Program, ProgramError, SchedClassifier, Xdp};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use aya_obj::generated::bpf_map_type::BPF_MAP_TYPE_ARRAY;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use svc_lb_common::config::Config;
use svc_lb_common::limits::name;
use svc_lb_common::outcome::Hook;
use svc_lb_common::socket::SocketHook;
use thiserror::Error;
use tracing::{debug, info, warn};

use super::clock::jiffies_per_second;
use super::kernel::MapSet;
use super::pins::{self, PinError, Pins};
use super::sizes::MapSizes;
use super::sys::ObjectKind;

/// The name of the frozen global.
pub(super) const CONFIG: &str = "CONFIG";
/// A pinned array of one u64 beside the programs' maps: the secret seed of selection. It must live
/// exactly as long as the flows that were opened with it, hence a pin and not a file.
const SEED: &str = "seed";
/// Lines of the verifier's log that an error shows.
const LOG_TAIL: usize = 40;
/// Maps whose content is worth nothing: where their shape has changed they are made anew.
const DISPOSABLE: [&str; 4] = [name::COUNTERS, name::BUCKET, name::MET[0], name::MET[1]];

/// Why the programs cannot be loaded.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum LoadError {
    #[error("this svc-lb was built without its BPF object; build it with: cargo xtask build")]
    NoObject,
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("the BPF object inside this svc-lb is damaged: {0}")]
    Object(#[from] aya_obj::ParseError),
    #[error("read the pinned map {path}")]
    MapInfo { path: PathBuf, source: MapError },
    #[error(
        "the pinned map {path} has {field} {found}, this version needs {wanted}; \
         start afresh, connections through services break: svc-lb detach --pin-dir '{base}'"
    )]
    Mismatch {
        path: PathBuf,
        field: &'static str,
        found: u32,
        wanted: u32,
        base: PathBuf,
    },
    #[error("the seed of selection in {path}")]
    Seed { path: PathBuf, source: MapError },
    #[error("create the maps")]
    Ebpf(#[source] Box<EbpfError>),
    #[error("the object has no program {0}")]
    NoProgram(&'static str),
    #[error("the kernel refused the program {program}: {source}\n{log}")]
    Refused {
        program: &'static str,
        log: String,
        source: io::Error,
    },
    #[error("the program {program}")]
    Program {
        program: &'static str,
        source: Box<ProgramError>,
    },
    #[error("{operation}")]
    System {
        operation: &'static str,
        source: io::Error,
    },
}

/// What to load.
#[derive(Debug)]
pub struct Settings<'a> {
    /// The ELF file of the programs; [`object`] has the one inside this binary.
    pub object: &'a [u8],
    /// Where the maps are pinned, prepared and locked.
    pub pins: &'a Pins,
    /// Entries of maps that do not exist yet.
    pub sizes: &'a MapSizes,
    /// The frozen settings; the loader fills in `seed`, `hz` and `guard_words`.
    pub config: Config,
    /// Load the socket hooks' programs too.
    pub sockets: bool,
}

/// The loaded programs, one for each hook.
#[derive(Debug)]
pub struct Programs {
    by_hook: BTreeMap<&'static str, LoadedProgram>,
    /// Why the socket hooks' programs are missing, if they were wanted and the kernel refused one.
    pub sockets_refused: Option<LoadError>,
    /// Why `xdp_ingress` is missing, if it is.
    pub xdp_refused: Option<LoadError>,
}

#[derive(Debug)]
struct LoadedProgram {
    fd: OwnedFd,
    id: u32,
    verified_instructions: Option<u32>,
}

/// What [`load`] returns.
#[derive(Debug)]
pub struct Loaded {
    /// The programs; attached to nothing yet.
    pub programs: Programs,
    /// The settings as loaded.
    pub config: Config,
    /// Maps were adopted from an earlier agent.
    pub adopted: bool,
    /// aya's handle, for the diagnostics log.
    pub ebpf: Ebpf,
}

/// The ELF file of the programs inside this binary.
pub fn object() -> Result<&'static [u8], LoadError> {
    #[cfg(no_bpf_object)]
    return Err(LoadError::NoObject);
    #[cfg(not(no_bpf_object))]
    Ok(aya::include_bytes_aligned!(env!("SVC_LB_BPF_OBJECT")))
}

/// Loads the programs over the pinned maps, creating and pinning the maps that are missing, and
/// pins the programs. Attaches nothing.
///
/// XDP is an addition: a kernel that refuses only `xdp_ingress` still gets the others.
pub fn load(settings: &Settings<'_>) -> Result<Loaded, LoadError> {
    let Settings {
        object,
        pins,
        sizes,
        config,
        sockets,
    } = settings;
    allow_locked_memory();
    let adopted = adopt(object, pins, sizes)?;
    let config = Config {
        seed: seed(pins)?,
        hz: jiffies_per_second().map_err(|source| LoadError::System {
            operation: "read the kernel's tick from the coarse clock",
            source,
        })?,
        guard_words: adopted
            .get(name::GUARD)
            .copied()
            .or_else(|| sizes.get(name::GUARD))
            .unwrap_or(config.guard_words),
        ..*config
    };

    let (programs, ebpf) =
        load_programs(*sockets, |level| create(settings, &adopted, &config, level))?;
    for (name, program) in &programs.by_hook {
        pins::replace(&program.fd, &pins.program(name))?;
    }
    info!(
        pin_dir = %pins.base().display(),
        layout = pins.version(),
        adopted = adopted.len(),
        "programs loaded"
    );
    Ok(Loaded {
        programs,
        config,
        adopted: !adopted.is_empty(),
        ebpf,
    })
}

/// Loads all programs of what `create` makes, those of the socket hooks if `sockets` says so. A refused
/// program is tried once more with the verifier's whole log.
pub(super) fn load_programs(
    sockets: bool,
    create: impl Fn(VerifierLogLevel) -> Result<Ebpf, LoadError>,
) -> Result<(Programs, Ebpf), LoadError> {
    let mut ebpf = create(VerifierLogLevel::STATS)?;
    let mut programs = Programs {
        by_hook: BTreeMap::new(),
        xdp_refused: None,
        sockets_refused: None,
    };
    for hook in Hook::ALL {
        let load = match hook {
            Hook::XdpIngress => load_xdp,
            Hook::TcIngress | Hook::TcEgress => load_tc,
        };
        match (load_program(&mut ebpf, &create, hook.name(), load), hook) {
            (Ok(program), _) => {
                programs.by_hook.insert(hook.name(), program);
            }
            (Err(error @ LoadError::Refused { .. }), Hook::XdpIngress) => {
                programs.xdp_refused = Some(error);
            }
            (Err(error), _) => return Err(error),
        }
    }
    for hook in SocketHook::ALL.into_iter().filter(|_| sockets) {
        match load_program(&mut ebpf, &create, hook.name(), load_socket) {
            Ok(program) => {
                programs.by_hook.insert(hook.name(), program);
            }
            Err(error @ LoadError::Refused { .. }) => {
                programs.sockets_refused = Some(error);
                break;
            }
            Err(error) => return Err(error),
        }
    }
    Ok((programs, ebpf))
}

impl Programs {
    /// The program of a hook; none for XDP where the kernel refused it.
    #[must_use]
    pub fn of(&self, hook: Hook) -> Option<BorrowedFd<'_>> {
        self.by_hook
            .get(hook.name())
            .map(|program| program.fd.as_fd())
    }

    /// The kernel's id of a hook's program.
    #[must_use]
    pub fn id(&self, hook: Hook) -> Option<u32> {
        self.by_hook.get(hook.name()).map(|program| program.id)
    }

    /// The program of a socket hook, and the kernel's id of it.
    #[must_use]
    pub fn socket(&self, hook: SocketHook) -> Option<(BorrowedFd<'_>, u32)> {
        let program = self.by_hook.get(hook.name())?;
        Some((program.fd.as_fd(), program.id))
    }

    /// Names and kernel's ids of all.
    pub fn ids(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.by_hook
            .iter()
            .map(|(name, program)| (*name, program.id))
    }

    /// Instructions that the verifier walked through, by program; kernels before 5.16 do not tell.
    pub fn verified_instructions(&self) -> impl Iterator<Item = (&'static str, u32)> {
        self.by_hook
            .iter()
            .filter_map(|(name, program)| Some((*name, program.verified_instructions?)))
    }
}

/// Opens the pinned maps, for [`Kernel`](super::kernel::Kernel); needs no agent.
pub fn open_maps(pins: &Pins) -> Result<MapSet, PinError> {
    let mut maps = MapSet::default();
    for name in name::PINNED {
        if let Some(fd) = pins::open(&pins.map(name), ObjectKind::Map)? {
            maps.fds.insert(name, fd);
        }
    }
    Ok(maps)
}

/// Compares what is pinned with what the object wants: aya reuses a pinned map whatever its
/// sizes, and the kernel would then copy more bytes than the program's value holds.
///
/// Returns the entries of the maps that exist and fit.
fn adopt(object: &[u8], pins: &Pins, sizes: &MapSizes) -> Result<BTreeMap<String, u32>, LoadError> {
    let wanted: BTreeMap<String, aya_obj::Map> =
        aya_obj::Object::parse(object)?.maps.into_iter().collect();
    let mut adopted = BTreeMap::new();
    for name in name::PINNED {
        let Some(map) = wanted.get(name) else {
            continue;
        };
        let path = pins.map(name);
        let Some(_) = pins::open(&path, ObjectKind::Map)? else {
            continue;
        };
        let info = MapInfo::from_pin(&path).map_err(|source| LoadError::MapInfo {
            path: path.clone(),
            source,
        })?;
        let Some((field, found, wanted)) = difference(&info, map, sizes.get(name).is_some()) else {
            if let Some(wanted) = sizes.get(name)
                && wanted != info.max_entries()
            {
                warn!(
                    map = name,
                    entries = info.max_entries(),
                    wanted,
                    "the pinned map keeps its size until `svc-lb detach` or a reboot"
                );
            }
            adopted.insert(name.to_owned(), info.max_entries());
            continue;
        };
        if !DISPOSABLE.contains(&name) {
            return Err(LoadError::Mismatch {
                path,
                field,
                found,
                wanted,
                base: pins.base().to_owned(),
            });
        }
        info!(map = name, field, found, wanted, "made anew");
        pins::unpin(&path)?;
    }
    Ok(adopted)
}

/// The first field in which a pinned map is not the one wanted: name, found, wanted.
fn difference(
    found: &MapInfo,
    wanted: &aya_obj::Map,
    sizeable: bool,
) -> Option<(&'static str, u32, u32)> {
    let kind = found.map_type().map_or(u32::MAX, |kind| kind as u32);
    let entries = if sizeable {
        found.max_entries()
    } else {
        wanted.max_entries()
    };
    [
        ("type", kind, wanted.map_type()),
        ("key size", found.key_size(), wanted.key_size()),
        ("value size", found.value_size(), wanted.value_size()),
        ("flags", found.map_flags(), wanted.map_flags()),
        ("entries", found.max_entries(), entries),
    ]
    .into_iter()
    .find(|(_, found, wanted)| found != wanted)
}

/// Creates or opens the maps and prepares the programs.
fn create(
    settings: &Settings<'_>,
    adopted: &BTreeMap<String, u32>,
    config: &Config,
    level: VerifierLogLevel,
) -> Result<Ebpf, LoadError> {
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(level)
        .override_global(CONFIG, config, true);
    for name in name::PINNED {
        loader.map_pin_path(name, settings.pins.map(name));
    }
    for (name, entries) in settings.sizes.iter() {
        loader.map_max_entries(name, adopted.get(name).copied().unwrap_or(entries));
    }
    loader
        .load(settings.object)
        .map_err(|error| LoadError::Ebpf(Box::new(error)))
}

fn load_xdp(program: &mut Program) -> Result<(), ProgramError> {
    <&mut Xdp>::try_from(program)?.load()
}

fn load_tc(program: &mut Program) -> Result<(), ProgramError> {
    <&mut SchedClassifier>::try_from(program)?.load()
}

fn load_socket(program: &mut Program) -> Result<(), ProgramError> {
    <&mut CgroupSockAddr>::try_from(program)?.load()
}

/// Loads a program; one that is refused is tried once more for the verifier's whole log.
fn load_program(
    ebpf: &mut Ebpf,
    create: impl Fn(VerifierLogLevel) -> Result<Ebpf, LoadError>,
    name: &'static str,
    load: fn(&mut Program) -> Result<(), ProgramError>,
) -> Result<LoadedProgram, LoadError> {
    let loaded = match try_program(ebpf, name, load) {
        Err(LoadError::Refused { .. }) => {
            try_program(&mut create(VerifierLogLevel::default())?, name, load)
        }
        other => other,
    };
    if let Ok(LoadedProgram {
        id,
        verified_instructions,
        ..
    }) = &loaded
    {
        debug!(
            program = name,
            id,
            instructions = verified_instructions,
            "program loaded"
        );
    }
    loaded
}

fn try_program(
    ebpf: &mut Ebpf,
    name: &'static str,
    load: fn(&mut Program) -> Result<(), ProgramError>,
) -> Result<LoadedProgram, LoadError> {
    let failed = |source| LoadError::Program {
        program: name,
        source: Box::new(source),
    };
    let program = ebpf.program_mut(name).ok_or(LoadError::NoProgram(name))?;
    match load(program) {
        Ok(()) => {}
        Err(ProgramError::LoadError {
            io_error,
            verifier_log,
        }) => {
            return Err(LoadError::Refused {
                program: name,
                log: tail(&verifier_log.to_string()),
                source: io_error,
            });
        }
        Err(error) => return Err(failed(error)),
    }
    describe(program).map_err(failed)
}

fn describe(program: &Program) -> Result<LoadedProgram, ProgramError> {
    let info = program.info()?;
    Ok(LoadedProgram {
        fd: program.fd()?.as_fd().try_clone_to_owned()?,
        id: info.id(),
        verified_instructions: info.verified_instruction_count(),
    })
}

/// The last lines of the verifier's log: the refused instruction and how it was reached.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL);
    lines.get(from..).unwrap_or_default().join("\n")
}

/// The seed in the pins, or a new one.
fn seed(pins: &Pins) -> Result<u64, LoadError> {
    let path = pins.map(SEED);
    let failed = |source| LoadError::Seed {
        path: path.clone(),
        source,
    };
    if pins::open(&path, ObjectKind::Map)?.is_some() {
        let map = MapData::from_pin(&path).map_err(failed)?;
        let array: Array<_, u64> = Map::Array(map).try_into().map_err(failed)?;
        return array.get(&0, 0).map_err(failed);
    }
    let mut bytes = [0; 8];
    getrandom(&mut bytes)?;
    let seed = u64::from_ne_bytes(bytes);
    let shape = aya_obj::Map::new_from_params(BPF_MAP_TYPE_ARRAY as u32, 4, 8, 1, 0);
    let map = MapData::create(shape, SEED, None).map_err(failed)?;
    let mut array: Array<_, u64> = Map::Array(map).try_into().map_err(failed)?;
    array.set(0, seed, 0).map_err(failed)?;
    array.pin(&path).map_err(|error| {
        failed(MapError::PinError {
            name: Some(SEED.to_owned()),
            error,
        })
    })?;
    Ok(seed)
}

fn getrandom(buffer: &mut [u8]) -> Result<(), LoadError> {
    // SAFETY: the buffer is writable for its length.
    let read = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    if usize::try_from(read) == Ok(buffer.len()) {
        return Ok(());
    }
    Err(LoadError::System {
        operation: "getrandom",
        source: io::Error::last_os_error(),
    })
}

/// Kernels before 5.11 charge maps and programs to RLIMIT_MEMLOCK.
pub(super) fn allow_locked_memory() {
    if KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(5, 11, 0)) {
        return;
    }
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        warn!(%error, "cannot raise RLIMIT_MEMLOCK; creating maps may fail");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_of_the_log_is_its_end() {
        let log: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        let tail = tail(&log.join("\n"));
        assert!(tail.starts_with("60\n") && tail.ends_with("\n99"), "{tail}");
    }
}
