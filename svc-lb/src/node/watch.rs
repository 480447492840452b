//! Keeps the node's facts current.
#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "netlink's enums are open: most of what they can say does not matter here"
)]

use std::sync::Arc;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt as _, StreamExt as _};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::proto::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{Node, NodeError, read};

/// Pause before facts are read again after a failure.
const RETRY: Duration = Duration::from_secs(1);

type Events = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

/// Publishes the node's facts whenever they change.
#[derive(Debug)]
pub struct Watcher {
    handle: Handle,
    events: Events,
    sender: watch::Sender<Arc<Node>>,
}

/// What an event makes stale.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Stale {
    links: bool,
    addresses: bool,
    default_routes: bool,
}

impl Stale {
    const ALL: Self = Self {
        links: true,
        addresses: true,
        default_routes: true,
    };

    fn by(message: &NetlinkMessage<RouteNetlinkMessage>) -> Self {
        let NetlinkPayload::InnerMessage(message) = &message.payload else {
            // Above all NLMSG_OVERRUN: events were lost.
            return Self::ALL;
        };
        match message {
            // Addresses and routes of a link that goes down or away go without a word.
            RouteNetlinkMessage::NewLink(_) => Self {
                links: true,
                default_routes: true,
                ..Self::default()
            },
            RouteNetlinkMessage::DelLink(_) => Self::ALL,
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => Self {
                addresses: true,
                ..Self::default()
            },
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => Self {
                default_routes: read::is_default(route),
                ..Self::default()
            },
            _ => Self::default(),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            links: self.links || other.links,
            addresses: self.addresses || other.addresses,
            default_routes: self.default_routes || other.default_routes,
        }
    }
}

/// Reads the node's facts and starts listening for changes; run the watcher to keep them current.
///
/// The sockets belong to the network namespace of the calling thread.
pub async fn watch() -> Result<(Watcher, watch::Receiver<Arc<Node>>), NodeError> {
    // Listen first, then read: nothing falls between.
    let (connection, _, events) = new_multicast_connection(&[
        MulticastGroup::Link,
        MulticastGroup::Ipv4Ifaddr,
        MulticastGroup::Ipv6Ifaddr,
        MulticastGroup::Ipv4Route,
        MulticastGroup::Ipv6Route,
    ])
    .map_err(NodeError::Socket)?;
    tokio::spawn(connection);
    let handle = read::requests()?;
    let node = read::everything(&handle).await?;
    let (sender, receiver) = watch::channel(Arc::new(node));
    Ok((
        Watcher {
            handle,
            events,
            sender,
        },
        receiver,
    ))
}

impl Watcher {
    /// Runs until nobody is interested any more, or the socket fails.
    pub async fn run(mut self) {
        let mut stale = Stale::default();
        while !self.sender.is_closed() {
            if stale == Stale::default() {
                let Some((message, _)) = self.events.next().await else {
                    warn!("the netlink event socket closed; interfaces are no longer watched");
                    return;
                };
                stale = Stale::by(&message);
            }
            // A pod's start is a dozen events: one read for all that are there.
            while let Some(Some((message, _))) = self.events.next().now_or_never() {
                stale = stale.or(Stale::by(&message));
            }
            match self.refresh(stale).await {
                Ok(()) => stale = Stale::default(),
                Err(error) => {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "node facts are stale"
                    );
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Reads again what is stale and publishes it if it differs.
    async fn refresh(&self, stale: Stale) -> Result<(), NodeError> {
        let mut node = Node::clone(&self.sender.borrow());
        if stale.links {
            node.links = read::links(&self.handle).await?;
        }
        if stale.addresses {
            (node.addresses, node.first_addresses) = read::addresses(&self.handle).await?;
        }
        if stale.default_routes {
            node.default_routes = read::default_routes(&self.handle).await?;
        }
        self.sender.send_if_modified(|current| {
            let changed = **current != node;
            if changed {
                debug!(
                    links = node.links.len(),
                    addresses = node.addresses.len(),
                    "node changed"
                );
                *current = Arc::new(node);
            }
            changed
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rtnetlink::RouteMessageBuilder;
    use rtnetlink::packet_core::NetlinkHeader;
    use rtnetlink::packet_route::link::LinkMessage;

    use super::*;

    fn event(message: RouteNetlinkMessage) -> NetlinkMessage<RouteNetlinkMessage> {
        NetlinkMessage::new(
            NetlinkHeader::default(),
            NetlinkPayload::InnerMessage(message),
        )
    }

    #[test]
    fn only_default_routes_make_the_default_routes_stale() {
        let default = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let stale = Stale::by(&event(RouteNetlinkMessage::NewRoute(default)));
        assert!(stale.default_routes && !stale.links);

        let other = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(Ipv4Addr::new(10, 0, 0, 0), 8)
            .build();
        let stale = Stale::by(&event(RouteNetlinkMessage::DelRoute(other)));
        assert_eq!(stale, Stale::default());
    }

    #[test]
    fn an_overrun_makes_everything_stale() {
        let overrun = NetlinkMessage::new(
            NetlinkHeader::default(),
            NetlinkPayload::Overrun(Vec::new()),
        );
        assert_eq!(Stale::by(&overrun), Stale::ALL);
        let gone = event(RouteNetlinkMessage::DelLink(LinkMessage::default()));
        assert_eq!(Stale::by(&gone), Stale::ALL);
    }
}
