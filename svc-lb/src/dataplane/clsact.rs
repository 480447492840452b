//! The classic way into tc, for kernels without tcx (before 6.6): a clsact qdisc with one filter
//! each way, at a fixed priority and handle, so that the next agent finds and replaces them.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's enums are open: most of what they can say does not matter here"
)]

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use rtnetlink::{Error, Handle};
use svc_lb_common::outcome::Hook;

/// "SVLB": no other agent's choice.
const FILTER_HANDLE: u32 = 0x5356_4c42;
/// Every filter's name begins so in `tc filter show`.
const NAME_PREFIX: &str = "svc-lb/";
/// ETH_P_ALL, network byte order.
const ALL_PROTOCOLS: u16 = 0x0003u16.to_be();
const QDISC: &str = "clsact";

/// A direction, by the program that belongs there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Direction {
    /// `tc_ingress`, ahead of all other filters.
    Ingress,
    /// `tc_egress`, after all other filters.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    fn hook(self) -> Hook {
        match self {
            Self::Ingress => Hook::TcIngress,
            Self::Egress => Hook::TcEgress,
        }
    }

    fn parent(self) -> TcHandle {
        TcHandle {
            major: TcHandle::CLSACT.major,
            minor: match self {
                Self::Ingress => TcHandle::MIN_INGRESS,
                Self::Egress => TcHandle::MIN_EGRESS,
            },
        }
    }

    fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => u16::MAX,
        }
    }
}

/// A filter found on an interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Filter {
    /// Its direction.
    pub direction: Direction,
    /// Lower is earlier.
    pub priority: u16,
    /// bpf, u32, flower and the like.
    pub kind: String,
    /// What `tc filter show` calls a BPF filter.
    pub name: String,
    /// The kernel's id of its program.
    pub program: Option<u32>,
    /// Made by an svc-lb agent.
    pub ours: bool,
}

/// Makes the qdisc; `false` if there is one already.
pub async fn add_qdisc(netlink: &Handle, ifindex: u32) -> Result<bool, Error> {
    let request = RouteNetlinkMessage::NewQueueDiscipline(qdisc(ifindex));
    match execute(netlink, request, NLM_F_CREATE | NLM_F_EXCL).await {
        Ok(()) => Ok(true),
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the qdisc with all its filters; that there is none is fine.
pub async fn remove_qdisc(netlink: &Handle, ifindex: u32) -> Result<(), Error> {
    let request = RouteNetlinkMessage::DelQueueDiscipline(qdisc(ifindex));
    absent_is_fine(execute(netlink, request, 0).await)
}

/// Adds our filter, or replaces its program in one step.
pub async fn set_filter(
    netlink: &Handle,
    ifindex: u32,
    direction: Direction,
    program: BorrowedFd<'_>,
) -> Result<(), Error> {
    let mut message = filter(ifindex, direction);
    let options = [
        TcFilterBpfOption::ProgFd(program.as_fd().as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName(format!("{NAME_PREFIX}{}", direction.hook().name())),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let options = options.map(TcOption::Bpf).to_vec();
    message.attributes.push(TcAttribute::Options(options));
    execute(
        netlink,
        RouteNetlinkMessage::NewTrafficFilter(message),
        NLM_F_CREATE,
    )
    .await
}

/// Removes our filter; that there is none is fine.
pub async fn remove_filter(
    netlink: &Handle,
    ifindex: u32,
    direction: Direction,
) -> Result<(), Error> {
    let request = RouteNetlinkMessage::DelTrafficFilter(filter(ifindex, direction));
    absent_is_fine(execute(netlink, request, 0).await)
}

/// Lists the filters of an interface, both directions, ours and others'.
pub async fn filters(netlink: &Handle, ifindex: u32) -> Result<Vec<Filter>, Error> {
    let mut filters = Vec::new();
    for direction in Direction::ALL {
        let mut message = TcMessage::with_index(ifindex.cast_signed());
        message.header.parent = direction.parent();
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetTrafficFilter(message));
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut netlink = netlink.clone();
        let mut answers = netlink.request(request)?;
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(found)) => {
                    filters.extend(describe(direction, &found));
                }
                NetlinkPayload::Error(error) => {
                    absent_is_fine(Err(Error::NetlinkError(error)))?;
                }
                _ => {}
            }
        }
    }
    Ok(filters)
}

/// Whether an interface has a clsact qdisc.
pub async fn has_qdisc(netlink: &Handle, ifindex: u32) -> Result<bool, Error> {
    let mut qdiscs = netlink.qdisc().get().index(ifindex.cast_signed()).execute();
    while let Some(found) = qdiscs.try_next().await? {
        let kind = TcAttribute::Kind(QDISC.to_owned());
        if found.header.index == ifindex.cast_signed() && found.attributes.contains(&kind) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The error number in a netlink error.
#[must_use]
pub fn errno(error: &Error) -> Option<i32> {
    match error {
        Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

/// No such interface, qdisc or filter: what was to be removed is not there.
fn absent_is_fine(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        // EINVAL: "Parent Qdisc doesn't exist".
        Err(error)
            if matches!(
                errno(&error),
                Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn qdisc(ifindex: u32) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle {
        major: TcHandle::CLSACT.major,
        minor: 0,
    };
    message.attributes.push(TcAttribute::Kind(QDISC.to_owned()));
    message
}

fn filter(ifindex: u32, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(ifindex.cast_signed());
    message.header.parent = direction.parent();
    message.header.handle = TcHandle::from(FILTER_HANDLE);
    message.header.info = u32::from(TcHandle {
        major: direction.priority(),
        minor: ALL_PROTOCOLS,
    });
    message
        .attributes
        .push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message
}

/// `None` for the entries that stand for a priority, not for a filter.
fn describe(direction: Direction, message: &TcMessage) -> Option<Filter> {
    if message.header.handle == TcHandle::UNSPEC {
        return None;
    }
    let mut filter = Filter {
        direction,
        priority: TcHandle::from(message.header.info).major,
        kind: String::new(),
        name: String::new(),
        program: None,
        ours: false,
    };
    for attribute in &message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => filter.kind.clone_from(kind),
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => {
                            filter.name.clone_from(name);
                        }
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = Some(*id),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    filter.ours = message.header.handle == TcHandle::from(FILTER_HANDLE)
        && filter.name.starts_with(NAME_PREFIX);
    Some(filter)
}

async fn execute(netlink: &Handle, message: RouteNetlinkMessage, flags: u16) -> Result<(), Error> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut netlink = netlink.clone();
    let mut answers = netlink.request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}
