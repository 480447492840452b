//! The only raw bpf(2) calls: what aya 0.14 does not offer. Links by interface index (aya takes
//! names, which may be reused meanwhile, and falls back to netlink silently), where a link is
//! attached, and programs of a few instructions that probe the kernel.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya_obj::generated::{
    bpf_attach_type, bpf_cmd, bpf_insn, bpf_link_info, bpf_link_type, bpf_prog_type,
};
use svc_lb_common::socket::SocketHook;

pub mod map;

/// Runs one bpf(2) command; returns its non-negative result.
///
/// # Safety
/// `attr` must be the command's part of `union bpf_attr`, and every pointer in it must be valid
/// for what the command does with it.
pub(super) unsafe fn bpf<A>(command: bpf_cmd, attr: &mut A) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes at most `size_of::<A>()` bytes of `attr`; the rest is
    // the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as u32,
            &raw mut *attr,
            size_of::<A>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

/// A file descriptor as bpf(2) takes it.
pub(super) fn raw(fd: impl AsFd) -> u32 {
    fd.as_fd().as_raw_fd().cast_unsigned()
}

/// The file descriptor that a command returned.
fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel just made it for this process, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[repr(C)]
struct Object {
    pathname: u64,
    fd: u32,
    flags: u32,
}

/// Pins a map, program or link at `path`, which must not exist.
pub fn pin(fd: impl AsFd, path: &Path) -> io::Result<()> {
    let pathname = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        pathname: pathname.as_ptr().expose_provenance() as u64,
        fd: raw(fd),
        flags: 0,
    };
    // SAFETY: BPF_OBJ_PIN reads the terminated string, which lives until here.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }?;
    Ok(())
}

/// Opens whatever is pinned at `path`.
pub fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let pathname = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = Object {
        pathname: pathname.as_ptr().expose_provenance() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: BPF_OBJ_GET reads the terminated string, which lives until here.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr) }.map(owned)
}

/// Where a program runs on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachPoint {
    /// tcx ingress, ahead of every program that is there.
    TcxIngressFirst,
    /// tcx egress, after every program that is there.
    TcxEgressLast,
    /// XDP in the driver.
    XdpNative,
    /// XDP after the driver, on any.
    XdpGeneric,
}

impl AttachPoint {
    fn attach_type(self) -> bpf_attach_type {
        match self {
            Self::TcxIngressFirst => bpf_attach_type::BPF_TCX_INGRESS,
            Self::TcxEgressLast => bpf_attach_type::BPF_TCX_EGRESS,
            Self::XdpNative | Self::XdpGeneric => bpf_attach_type::BPF_XDP,
        }
    }

    fn flags(self) -> u32 {
        match self {
            Self::TcxIngressFirst => aya_obj::generated::BPF_F_BEFORE,
            Self::TcxEgressLast => aya_obj::generated::BPF_F_AFTER,
            Self::XdpNative => aya_obj::generated::XDP_FLAGS_DRV_MODE,
            Self::XdpGeneric => aya_obj::generated::XDP_FLAGS_SKB_MODE,
        }
    }
}

#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    /// Interface index, or the descriptor of a cgroup.
    target: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    reserved: u32,
    expected_revision: u64,
}

/// Attaches a program to an interface of the caller's network namespace. The program stays until
/// the last reference to the link, a file descriptor or a pin, is gone.
///
/// # Errors
/// ENODEV: no such interface; EBUSY: XDP is taken; EOPNOTSUPP: no native XDP; EINVAL: the kernel
/// has no such link.
pub fn link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    point: AttachPoint,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreate {
        prog_fd: raw(program),
        target: ifindex,
        attach_type: point.attach_type() as u32,
        flags: point.flags(),
        relative_fd: 0,
        reserved: 0,
        expected_revision: 0,
    };
    // SAFETY: BPF_LINK_CREATE follows no pointer for these attach types.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(owned)
}

/// Attaches a program to a cgroup, whose processes' sockets it then meets. Others' programs there stay.
///
/// # Errors
/// EPERM: somebody attached one exclusively.
pub fn link_create_cgroup(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    hook: SocketHook,
) -> io::Result<OwnedFd> {
    let attach_type = match hook {
        SocketHook::Connect4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        SocketHook::Connect6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
        SocketHook::Sendmsg4 => bpf_attach_type::BPF_CGROUP_UDP4_SENDMSG,
        SocketHook::Sendmsg6 => bpf_attach_type::BPF_CGROUP_UDP6_SENDMSG,
        SocketHook::Recvmsg4 => bpf_attach_type::BPF_CGROUP_UDP4_RECVMSG,
        SocketHook::Recvmsg6 => bpf_attach_type::BPF_CGROUP_UDP6_RECVMSG,
        SocketHook::Getpeername4 => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
        SocketHook::Getpeername6 => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    };
    let mut attr = LinkCreate {
        prog_fd: raw(program),
        target: raw(cgroup),
        attach_type: attach_type as u32,
        flags: 0,
        relative_fd: 0,
        reserved: 0,
        expected_revision: 0,
    };
    // SAFETY: BPF_LINK_CREATE follows no pointer for these attach types.
    unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr) }.map(owned)
}

#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Replaces a link's program in one step: every packet meets the old one or the new one.
///
/// # Errors
/// ENOLINK: the interface is gone.
pub fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate {
        link_fd: raw(link),
        new_prog_fd: raw(program),
        flags: 0,
        old_prog_fd: 0,
    };
    // SAFETY: BPF_LINK_UPDATE has no pointers.
    unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr) }?;
    Ok(())
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LinkInfo {
    /// The kernel's id of the link.
    pub id: u32,
    /// The kernel's id of the program.
    pub program: u32,
    /// Interface index; `None` once the interface is gone.
    pub ifindex: Option<u32>,
    /// XDP, not tcx.
    pub xdp: bool,
    /// Id of the cgroup; 0 once it is gone.
    pub cgroup: Option<u64>,
}

#[repr(C)]
struct Info {
    fd: u32,
    length: u32,
    buffer: u64,
}

/// Reads what a link is attached to.
///
/// # Errors
/// `InvalidData` if the link is of another kind than the agent makes; `InvalidInput` if the
/// descriptor is no link.
pub fn link_info(link: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    if object_kind(link)? != ObjectKind::Link {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a link"));
    }
    // SAFETY: plain integers, for which zero is a value.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attr = Info {
        fd: raw(link),
        length: u32::try_from(size_of_val(&info)).map_err(io::Error::other)?,
        buffer: (&raw mut info).expose_provenance() as u64,
    };
    // SAFETY: the kernel writes at most `length` bytes to `info`.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let xdp = info.type_ == bpf_link_type::BPF_LINK_TYPE_XDP as u32;
    let in_cgroup = info.type_ == bpf_link_type::BPF_LINK_TYPE_CGROUP as u32;
    let cgroup = if in_cgroup {
        // SAFETY: the field that belongs to this type; all bit patterns are values.
        Some(unsafe { info.__bindgen_anon_1.cgroup.cgroup_id })
    } else {
        None
    };
    let ifindex = if in_cgroup {
        0
    } else if xdp {
        // SAFETY: the field that belongs to this type; all bit patterns are values.
        unsafe { info.__bindgen_anon_1.xdp.ifindex }
    } else if info.type_ == bpf_link_type::BPF_LINK_TYPE_TCX as u32 {
        // SAFETY: as above.
        unsafe { info.__bindgen_anon_1.tcx.ifindex }
    } else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "neither a tcx nor an XDP nor a cgroup link",
        ));
    };
    Ok(LinkInfo {
        id: info.id,
        program: info.prog_id,
        ifindex: (ifindex != 0).then_some(ifindex),
        xdp,
        cgroup,
    })
}

/// Kinds of object that can be pinned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ObjectKind {
    /// A map.
    Map,
    /// A program.
    Program,
    /// A link.
    Link,
    /// Something else.
    Other,
}

/// Tells what a descriptor from [`open_pin`] is.
pub fn object_kind(fd: BorrowedFd<'_>) -> io::Result<ObjectKind> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
    Ok(match name.as_os_str().as_bytes() {
        b"anon_inode:bpf-map" => ObjectKind::Map,
        b"anon_inode:bpf-prog" => ObjectKind::Program,
        // Until 5.9 the name had a hyphen.
        b"anon_inode:bpf_link" | b"anon_inode:bpf-link" => ObjectKind::Link,
        _ => ObjectKind::Other,
    })
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[repr(C)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}

/// The few instructions that probes are made of.
pub mod insn {
    use aya_obj::generated::{
        BPF_ALU64, BPF_CALL, BPF_EXIT, BPF_JMP, BPF_K, BPF_MOV, bpf_func_id, bpf_insn,
    };

    /// `rN = value`
    #[must_use]
    pub fn mov(register: u8, value: i32) -> bpf_insn {
        instruction(BPF_ALU64 | BPF_MOV | BPF_K, register, value)
    }

    /// `r0 = helper(r1, ..., r5)`
    #[must_use]
    pub fn call(helper: bpf_func_id) -> bpf_insn {
        instruction(BPF_JMP | BPF_CALL, 0, (helper as u32).cast_signed())
    }

    /// `return r0`
    #[must_use]
    pub fn exit() -> bpf_insn {
        instruction(BPF_JMP | BPF_EXIT, 0, 0)
    }

    fn instruction(code: u32, register: u8, value: i32) -> bpf_insn {
        let [code, ..] = code.to_le_bytes();
        bpf_insn {
            code,
            _bitfield_align_1: [],
            _bitfield_1: bpf_insn::new_bitfield_1(register, 0),
            off: 0,
            imm: value,
        }
    }
}

/// Loads a program of a few instructions.
///
/// # Errors
/// EINVAL or EACCES if the verifier refuses it.
pub fn prog_load(kind: bpf_prog_type, instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    let mut attr = ProgLoad {
        prog_type: kind as u32,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
    };
    // SAFETY: the kernel reads `insn_cnt` instructions and the terminated licence.
    unsafe { bpf(bpf_cmd::BPF_PROG_LOAD, &mut attr) }.map(owned)
}

/// Runs a tc program once over a 64-byte packet of zeros and returns its verdict.
pub fn run_once(program: BorrowedFd<'_>) -> io::Result<u32> {
    let packet = [0u8; 64];
    let mut attr = TestRun {
        prog_fd: raw(program),
        retval: 0,
        data_size_in: 64,
        data_size_out: 0,
        data_in: packet.as_ptr().expose_provenance() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
    };
    // SAFETY: the kernel reads the 64 bytes of the packet.
    unsafe { bpf(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(attr.retval)
}
