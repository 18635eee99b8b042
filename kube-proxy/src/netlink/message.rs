//! Writing and reading netlink messages. A message is a header, a small netfilter header, and attributes: length,
//! type, value, padded to four bytes; a value can be attributes again. Lengths are filled in when a part is finished.

use super::Subsystem;

const HEADER: usize = 16;
const NETFILTER_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Messages one after another, as the kernel takes them.
#[derive(Debug, Default)]
pub struct Builder {
    bytes: Vec<u8>,
    message_at: usize,
}

impl Builder {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Forgets the messages but keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// One message of a subsystem; `fill` adds its attributes.
    pub fn message(
        &mut self,
        subsystem: Subsystem,
        kind: u8,
        flags: u16,
        sequence: u32,
        family: u8,
        fill: impl FnOnce(&mut Self),
    ) {
        let kind = (subsystem as u16) << 8 | u16::from(kind);
        self.raw(kind, flags, sequence, family, 0, fill);
    }

    /// A message with any type. `resource` is a number for the few messages that have one.
    pub fn raw(
        &mut self,
        kind: u16,
        flags: u16,
        sequence: u32,
        family: u8,
        resource: u16,
        fill: impl FnOnce(&mut Self),
    ) {
        self.message_at = self.bytes.len();
        let start = self.message_at;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&resource.to_be_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    /// Asks for an acknowledgement of the message that was written last.
    pub fn acknowledge_last(&mut self) {
        let at = self.message_at + 6;
        if let Some(flags) = self.bytes.get_mut(at..at + 2) {
            flags[0] |= super::flag::ACK as u8;
        }
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = (ATTRIBUTE_HEADER + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// In network order, as netfilter wants all its numbers.
    pub fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub fn long(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub fn text(&mut self, kind: u16, value: &str) {
        let length = (ATTRIBUTE_HEADER + value.len() + 1) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    /// Bytes of the message that is being written.
    pub fn message_length(&self) -> usize {
        self.bytes.len() - self.message_at
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[derive(Debug, thiserror::Error)]
#[error("a netlink message of the kernel ends too early")]
pub struct Malformed;

/// A message as it came from the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes behind the netfilter header.
    pub fn attributes(&self) -> Attributes<'a> {
        Attributes(self.payload.get(NETFILTER_HEADER..).unwrap_or_default())
    }

    pub fn is(&self, subsystem: Subsystem, kind: u8) -> bool {
        self.kind == (subsystem as u16) << 8 | u16::from(kind)
    }
}

/// The messages of one datagram.
pub fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Result<Message<'_>, Malformed>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let Some(message) = first_message(&mut datagram) else {
            datagram = &[];
            return Some(Err(Malformed));
        };
        Some(Ok(message))
    })
}

fn first_message<'a>(datagram: &mut &'a [u8]) -> Option<Message<'a>> {
    let bytes = *datagram;
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let message = bytes.get(..length)?;
    let payload = message.get(HEADER..)?;
    *datagram = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some(Message {
        kind: u16::from_ne_bytes(message[4..6].try_into().ok()?),
        flags: u16::from_ne_bytes(message[6..8].try_into().ok()?),
        sequence: u32::from_ne_bytes(message[8..12].try_into().ok()?),
        payload,
    })
}

/// Attributes, one after another; a broken one ends them.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a>(&'a [u8]);

#[derive(Clone, Copy, Debug)]
pub struct Attribute<'a> {
    pub kind: u16,
    pub value: &'a [u8],
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Attribute<'a>;

    fn next(&mut self) -> Option<Attribute<'a>> {
        let length = usize::from(u16::from_ne_bytes(self.0.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(self.0.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = self.0.get(ATTRIBUTE_HEADER..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Attribute { kind, value })
    }
}

impl<'a> Attributes<'a> {
    pub fn get(mut self, kind: u16) -> Option<Attribute<'a>> {
        self.find(|attribute| attribute.kind == kind)
    }

    /// Attributes inside attributes.
    pub fn path(self, kinds: &[u16]) -> Option<Attribute<'a>> {
        let (first, rest) = kinds.split_first()?;
        let found = self.get(*first)?;
        if rest.is_empty() { Some(found) } else { found.nested().path(rest) }
    }
}

impl<'a> Attribute<'a> {
    pub fn nested(&self) -> Attributes<'a> {
        Attributes(self.value)
    }

    pub fn number(&self) -> Option<u32> {
        self.value.try_into().ok().map(u32::from_be_bytes)
    }

    pub fn text(&self) -> Option<&'a str> {
        let end = self.value.iter().position(|&byte| byte == 0).unwrap_or(self.value.len());
        std::str::from_utf8(&self.value[..end]).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read() {
        let mut builder = Builder::default();
        builder.message(Subsystem::Nftables, 3, 7, 42, 2, |m| {
            m.text(1, "kube-proxy");
            m.nested(2, |n| {
                n.number(1, 99);
                n.attribute(2, &[1, 2, 3]);
            });
        });
        builder.message(Subsystem::Conntrack, 1, 0, 43, 2, |_| {});
        builder.acknowledge_last();
        let all: Vec<Message<'_>> = messages(builder.bytes()).map(Result::unwrap).collect();
        assert_eq!(all.len(), 2);
        assert!(all[0].is(Subsystem::Nftables, 3) && (all[0].flags, all[0].sequence) == (7, 42));
        assert_eq!(all[0].attributes().get(1).and_then(|a| a.text()), Some("kube-proxy"));
        assert_eq!(all[0].attributes().path(&[2, 1]).and_then(|a| a.number()), Some(99));
        assert_eq!(all[0].attributes().path(&[2, 2]).map(|a| a.value), Some(&[1_u8, 2, 3][..]));
        assert_eq!(all[1].flags, super::super::flag::ACK);
    }

    #[test]
    fn broken_bytes_end_the_reading() {
        for bytes in [&[1_u8][..], &[20, 0, 0, 0, 1, 1], &[0; 16], &[16, 0, 0]] {
            let read: Vec<_> = messages(bytes).take(5).collect();
            assert!(read.last().is_some_and(Result::is_err), "{bytes:?}");
        }
        assert_eq!(Attributes(&[9, 0, 1, 0, 5]).count(), 0);
        assert_eq!(Attributes(&[0, 0, 1, 0]).count(), 0);
    }
}
