//! Reads from the kernel whether any packet filter rule has changed, and the numbers of ours. A few small netlink
//! messages instead of a process that prints everything.

use std::io;

use rtnetlink::packet_core::NetlinkBuffer;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use crate::family::Family;

#[derive(Debug, thiserror::Error)]
pub enum RulesetError {
    #[error("cannot open a netfilter socket")]
    Open(#[source] io::Error),
    #[error("cannot ask the kernel for {what}")]
    Ask { what: &'static str, source: io::Error },
    #[error("the kernel's answer about {0} cannot be read")]
    Answer(&'static str),
}

/// Rules to look at: those of a chain, or of a whole table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub family: Family,
    pub table: &'static str,
    pub chain: Option<&'static str>,
    /// Only rules that have this name in them, for chains that others use too.
    pub mentioning: Option<&'static str>,
}

const NFTABLES: u16 = 10 << 8;
const GET_RULE: u16 = NFTABLES | 7;
const GET_GENERATION: u16 = NFTABLES | 16;
const REQUEST: u16 = 1;
const DUMP: u16 = 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const GENERATION_ID: u16 = 1;
/// Flags in an attribute's kind.
const NESTED: u16 = 0xc000;
const HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;

pub struct Ruleset {
    socket: TokioSocket,
}

impl Ruleset {
    pub fn open() -> Result<Self, RulesetError> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER).map_err(RulesetError::Open)?;
        socket.socket_mut().bind_auto().map_err(RulesetError::Open)?;
        socket.socket_ref().connect(&SocketAddr::new(0, 0)).map_err(RulesetError::Open)?;
        Ok(Self { socket })
    }

    /// The number of the ruleset, which grows with every change.
    pub async fn generation(&mut self) -> Result<u32, RulesetError> {
        let what = "the generation of the rules";
        self.send(what, &request(GET_GENERATION, REQUEST, 0, &[])).await?;
        let answer = self.receive(what).await?;
        let message = messages(&answer).next().ok_or(RulesetError::Answer(what))?;
        let id = message.attribute(GENERATION_ID).and_then(|value| value.try_into().ok());
        id.map(u32::from_be_bytes).ok_or(RulesetError::Answer(what))
    }

    /// The numbers of the rules at these places, in order. A place that does not exist has none.
    pub async fn handles(&mut self, places: &[Place]) -> Result<Vec<u64>, RulesetError> {
        let mut handles = Vec::new();
        for place in places {
            self.collect(place, &mut handles).await?;
        }
        Ok(handles)
    }

    async fn collect(&mut self, place: &Place, handles: &mut Vec<u64>) -> Result<(), RulesetError> {
        let what = "rules";
        let mut attributes = vec![(RULE_TABLE, place.table)];
        attributes.extend(place.chain.map(|chain| (RULE_CHAIN, chain)));
        let family = match place.family {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        };
        let family = u8::try_from(family).unwrap_or_default();
        self.send(what, &request(GET_RULE, REQUEST | DUMP, family, &attributes)).await?;
        loop {
            let answer = self.receive(what).await?;
            for message in messages(&answer) {
                match message.kind {
                    DONE => return Ok(()),
                    ERROR if message.error() == Some(libc::ENOENT) => return Ok(()),
                    ERROR => return Err(RulesetError::Answer(what)),
                    _ => {}
                }
                // Older kernels give more than was asked for.
                let in_place = message.text(RULE_TABLE) == Some(place.table)
                    && place.chain.is_none_or(|chain| message.text(RULE_CHAIN) == Some(chain));
                if in_place && place.mentioning.is_none_or(|name| message.mentions(name)) {
                    let handle = message.attribute(RULE_HANDLE).and_then(|value| value.try_into().ok());
                    handles.push(u64::from_be_bytes(handle.ok_or(RulesetError::Answer(what))?));
                }
            }
        }
    }

    async fn send(&mut self, what: &'static str, message: &[u8]) -> Result<(), RulesetError> {
        self.socket.send(message).await.map(|_| ()).map_err(|source| RulesetError::Ask { what, source })
    }

    async fn receive(&mut self, what: &'static str) -> Result<Vec<u8>, RulesetError> {
        let answer = self.socket.recv_from_full().await;
        answer.map(|(bytes, _)| bytes).map_err(|source| RulesetError::Ask { what, source })
    }
}

fn request(kind: u16, flags: u16, family: u8, attributes: &[(u16, &str)]) -> Vec<u8> {
    let mut body = vec![family, 0, 0, 0];
    for (kind, text) in attributes {
        let length = 4 + text.len() + 1;
        body.extend_from_slice(&u16::try_from(length).unwrap_or(u16::MAX).to_ne_bytes());
        body.extend_from_slice(&kind.to_ne_bytes());
        body.extend_from_slice(text.as_bytes());
        body.push(0);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    let mut message = Vec::with_capacity(HEADER + body.len());
    message.extend_from_slice(&u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);
    message
}

/// One message of an answer.
struct Message<'a> {
    kind: u16,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    fn attribute(&self, kind: u16) -> Option<&'a [u8]> {
        let mut rest = self.payload.get(NETFILTER_HEADER..)?;
        while let Some((header, _)) = rest.split_first_chunk::<4>() {
            let [l0, l1, k0, k1] = *header;
            let length = usize::from(u16::from_ne_bytes([l0, l1]));
            let value = rest.get(4..length)?;
            if u16::from_ne_bytes([k0, k1]) & !NESTED == kind {
                return Some(value);
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
        None
    }

    fn text(&self, kind: u16) -> Option<&'a str> {
        std::str::from_utf8(self.attribute(kind)?).ok().map(|text| text.trim_end_matches('\0'))
    }

    fn mentions(&self, name: &str) -> bool {
        self.payload.windows(name.len()).any(|window| window == name.as_bytes())
    }

    /// The number of the error, as positive as in the manual pages.
    fn error(&self) -> Option<i32> {
        let bytes = self.payload.get(..4)?.try_into().ok()?;
        Some(-i32::from_ne_bytes(bytes))
    }
}

fn messages(mut answer: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = NetlinkBuffer::new_checked(answer).ok()?.length() as usize;
        let (one, rest) = answer.split_at_checked(length.next_multiple_of(4)).unwrap_or((answer, &[]));
        let buffer = NetlinkBuffer::new_checked(one).ok()?;
        answer = rest;
        Some(Message { kind: buffer.message_type(), payload: buffer.payload() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_one_after_the_other() {
        let mut answer = request(NFTABLES | 6, 0, 2, &[(RULE_TABLE, "nat"), (RULE_CHAIN, "FLANNEL-FWD")]);
        answer.extend(request(DONE, 0, 0, &[]));
        answer.extend([1, 2, 3]);
        let all: Vec<Message> = messages(&answer).collect();
        assert_eq!(all.iter().map(|message| message.kind).collect::<Vec<_>>(), [NFTABLES | 6, DONE]);
        assert_eq!((all[0].text(RULE_TABLE), all[0].text(RULE_CHAIN)), (Some("nat"), Some("FLANNEL-FWD")));
        assert_eq!(all[0].attribute(RULE_HANDLE), None);
        assert!(all[0].mentions("FLANNEL") && !all[1].mentions("FLANNEL"));
    }

    #[test]
    fn junk_is_no_message() {
        assert_eq!(messages(&[]).count(), 0);
        assert_eq!(messages(&[255; 40]).count(), 0);
    }
}
