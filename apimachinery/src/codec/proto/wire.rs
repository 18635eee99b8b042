//! Protobuf's wire format: tags, varints, lengths.

use super::ProtoError;

/// Messages nest at most this deep; built-in kinds stay below 30, apart from schemas inside schemas.
pub const MAX_DEPTH: usize = 100;

pub const VARINT: u8 = 0;
pub const FIXED64: u8 = 1;
pub const BYTES: u8 = 2;
pub const FIXED32: u8 = 5;

pub fn varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n as u8) | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

pub fn tag(out: &mut Vec<u8>, number: u16, wire: u8) {
    varint(out, u64::from(number) << 3 | u64::from(wire));
}

/// What comes before so many bytes.
pub fn bytes_start(out: &mut Vec<u8>, number: u16, length: usize) {
    tag(out, number, BYTES);
    varint(out, length as u64);
}

/// How long a field of so many bytes is, when its number is below 16.
pub fn field_length(length: usize) -> usize {
    1 + varint_length(length) + length
}

fn varint_length(n: usize) -> usize {
    let bits = usize::BITS - (n | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

pub fn bytes_field(out: &mut Vec<u8>, number: u16, bytes: &[u8]) {
    bytes_start(out, number, bytes.len());
    out.extend_from_slice(bytes);
}

pub fn varint_field(out: &mut Vec<u8>, number: u16, n: i64) {
    tag(out, number, VARINT);
    varint(out, n as u64);
}

/// Writes a nested message whose body `write` appends; the length is put before it afterwards.
pub fn nested<E>(out: &mut Vec<u8>, number: u16, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<(), E> {
    tag(out, number, BYTES);
    // Most lengths are one byte; a longer one moves what follows.
    let at = out.len();
    out.push(0);
    write(out)?;
    let length = out.len() - at - 1;
    let more = varint_length(length) - 1;
    if more > 0 {
        let end = out.len();
        out.resize(end + more, 0);
        out.copy_within(at + 1..end, at + 1 + more);
    }
    let mut rest = length;
    for slot in &mut out[at..at + more] {
        *slot = rest as u8 | 0x80;
        rest >>= 7;
    }
    out[at + more] = rest as u8;
    Ok(())
}

/// The payload of one field.
#[derive(Clone, Copy, Debug)]
pub enum Payload<'a> {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(&'a [u8]),
    Fixed32,
}

impl Payload<'_> {
    pub fn wire_type(&self) -> u8 {
        match self {
            Self::Varint(_) => VARINT,
            Self::Fixed64(_) => FIXED64,
            Self::Bytes(_) => BYTES,
            Self::Fixed32 => FIXED32,
        }
    }
}

/// Reads a message field by field.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn varint(&mut self) -> Result<u64, ProtoError> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = self.0.split_first().ok_or(ProtoError::Truncated)?;
            self.0 = rest;
            n |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(ProtoError::Truncated)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8], ProtoError> {
        let length = usize::try_from(length).map_err(|_| ProtoError::Truncated)?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(ProtoError::Truncated)?;
        self.0 = rest;
        Ok(taken)
    }

    /// The next field's number and payload; `None` at the end.
    pub fn field(&mut self) -> Result<Option<(u32, Payload<'a>)>, ProtoError> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).map_err(|_| ProtoError::Truncated)?;
        let payload = match (key & 7) as u8 {
            VARINT => Payload::Varint(self.varint()?),
            FIXED64 => {
                let bytes = self.take(8)?;
                Payload::Fixed64(bytes.try_into().map_err(|_| ProtoError::Truncated)?)
            }
            BYTES => {
                let length = self.varint()?;
                Payload::Bytes(self.take(length)?)
            }
            FIXED32 => {
                self.take(4)?;
                Payload::Fixed32
            }
            other => return Err(ProtoError::WireType(number, other)),
        };
        Ok(Some((number, payload)))
    }
}

/// A payload that must be bytes.
pub fn expect_bytes<'a>(number: u32, payload: Payload<'a>) -> Result<&'a [u8], ProtoError> {
    match payload {
        Payload::Bytes(bytes) => Ok(bytes),
        other => Err(ProtoError::WireType(number, other.wire_type())),
    }
}

pub fn expect_varint(number: u32, payload: Payload<'_>) -> Result<u64, ProtoError> {
    match payload {
        Payload::Varint(n) => Ok(n),
        other => Err(ProtoError::WireType(number, other.wire_type())),
    }
}

pub fn utf8(bytes: &[u8]) -> Result<String, ProtoError> {
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| ProtoError::NotUtf8)
}
