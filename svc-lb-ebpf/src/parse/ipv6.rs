//! IPv6, with extension headers.

use network_types::ip::Ipv6Hdr;
use svc_lb_common::outcome::Outcome;

use super::{Fragment, Ip, Payload};
use crate::family::V6;
use crate::packet::{Packet, Step};

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Headers that are looked at, the transport header among them. RFC 8200 4.1 lists seven extension headers;
/// real chains have one or two.
const MAX_HEADERS: usize = 6;

/// Walks the extension headers to the transport header.
#[inline(always)]
pub(crate) fn payload<P: Packet>(packet: &P, ip: &Ip<V6>) -> Step<Payload> {
    let header = packet.load::<[u8; 7]>(ip.l3)?;
    let [first, _, _, _, _, _, next] = header;
    if first >> 4 != 6 {
        return Err(Outcome::Malformed);
    }
    let mut protocol = next;
    let mut l4 = ip.l3 + Ipv6Hdr::LEN;
    let mut fragment = Fragment::Whole;
    let mut id = 0;
    let mut walked = 0;
    while walked < MAX_HEADERS {
        let length = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS | AUTHENTICATION => {
                let [next, units] = packet.load::<[u8; 2]>(l4)?;
                // In 8-byte units after the first; the authentication header counts 4-byte
                // units after the second (RFC 4302 2.2).
                let length = match protocol {
                    AUTHENTICATION => (units as usize + 2) * 4,
                    _ => (units as usize + 1) * 8,
                };
                protocol = next;
                length
            }
            FRAGMENT => {
                let [next, _, high, low] = packet.load::<[u8; 4]>(l4)?;
                let this = packet.load::<u32>(l4 + 4)?;
                let word = u16::from_be_bytes([high, low]);
                if word & 0xfff8 != 0 {
                    // No transport header follows, whatever the header says.
                    return Ok(Payload {
                        l4: l4 + 8,
                        protocol: next,
                        fragment: Fragment::Later,
                        id: this,
                    });
                }
                if word & 1 != 0 {
                    (fragment, id) = (Fragment::First, this);
                }
                protocol = next;
                8
            }
            _ => {
                return Ok(Payload {
                    l4,
                    protocol,
                    fragment,
                    id,
                });
            }
        };
        l4 += length;
        walked += 1;
    }
    Err(Outcome::Malformed)
}
