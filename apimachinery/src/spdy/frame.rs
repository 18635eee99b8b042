//! SPDY/3.1 frames to and from bytes. Pure: no I/O, no stream state.
//!
//! Payloads of data frames are handed out as they arrive, in pieces, so that no more than one read's worth of a
//! 16 MiB frame is ever held; control frames are small and held whole.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::SpdyError;
use super::headers::{Headers, Inflater};

const VERSION: u16 = 3;
const CONTROL: u16 = 0x8000;
const FLAG_FIN: u8 = 1;
/// Larger control frames than this are refused: headers of real clients have a few hundred bytes.
const MAX_CONTROL: usize = 64 * 1024;
const STREAM_ID: u32 = 0x7fff_ffff;

/// `RST_STREAM` status codes that we send.
pub mod reset {
    pub const PROTOCOL_ERROR: u32 = 1;
    pub const INVALID_STREAM: u32 = 2;
    pub const REFUSED_STREAM: u32 = 3;
    pub const CANCEL: u32 = 5;
}

mod kind {
    pub const SYN_STREAM: u16 = 1;
    pub const SYN_REPLY: u16 = 2;
    pub const RST_STREAM: u16 = 3;
    pub const PING: u16 = 6;
    pub const GOAWAY: u16 = 7;
    pub const HEADERS: u16 = 8;
}

/// A frame whose headers are already decompressed. Frames that need no reaction (`SETTINGS`, `WINDOW_UPDATE`,
/// unknown types) are skipped by the decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    SynStream {
        stream: u32,
        headers: Headers,
        fin: bool,
    },
    SynReply {
        stream: u32,
        headers: Headers,
        fin: bool,
    },
    Headers {
        stream: u32,
        headers: Headers,
        fin: bool,
    },
    /// A piece of a data frame; `fin` is set on the last piece only.
    Data {
        stream: u32,
        data: Bytes,
        fin: bool,
    },
    RstStream {
        stream: u32,
        status: u32,
    },
    Ping(u32),
    GoAway {
        last_stream: u32,
    },
}

/// The data frame whose payload is being handed out.
#[derive(Debug)]
struct OpenData {
    stream: u32,
    remaining: usize,
    fin: bool,
}

/// Turns received bytes into frames.
pub struct Decoder {
    inflater: Inflater,
    data: Option<OpenData>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { inflater: Inflater::new(), data: None }
    }
}

impl Decoder {
    /// The next frame in `buffer`, or `None` when more bytes are needed.
    ///
    /// After an error the connection cannot be used any more: the compression state of both sides has parted.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, SpdyError> {
        loop {
            if let Some(open) = self.data.take() {
                return Ok(self.data_piece(open, buffer));
            }
            if buffer.len() < 8 {
                return Ok(None);
            }
            let first = u16::from_be_bytes([buffer[0], buffer[1]]);
            let flags = buffer[4];
            let length = usize::from(buffer[5]) << 16 | usize::from(buffer[6]) << 8 | usize::from(buffer[7]);
            if first & CONTROL == 0 {
                let stream = buffer.get_u32() & STREAM_ID;
                buffer.advance(4);
                self.data = Some(OpenData { stream, remaining: length, fin: flags & FLAG_FIN != 0 });
                continue;
            }
            let frame_kind = u16::from_be_bytes([buffer[2], buffer[3]]);
            if first & !CONTROL != VERSION {
                return Err(SpdyError::Version(first & !CONTROL));
            }
            if length > MAX_CONTROL {
                return Err(SpdyError::FrameLength { kind: frame_kind, length });
            }
            if buffer.len() < 8 + length {
                buffer.reserve(8 + length - buffer.len());
                return Ok(None);
            }
            buffer.advance(8);
            let payload = buffer.split_to(length).freeze();
            if let Some(frame) = self.control(frame_kind, flags, payload)? {
                return Ok(Some(frame));
            }
        }
    }

    fn data_piece(&mut self, open: OpenData, buffer: &mut BytesMut) -> Option<Frame> {
        let take = open.remaining.min(buffer.len());
        if take == 0 && open.remaining > 0 {
            self.data = Some(open);
            return None;
        }
        let data = buffer.split_to(take).freeze();
        let remaining = open.remaining - take;
        if remaining > 0 {
            self.data = Some(OpenData { remaining, ..open });
        }
        Some(Frame::Data { stream: open.stream, data, fin: open.fin && remaining == 0 })
    }

    fn control(&mut self, frame_kind: u16, flags: u8, mut payload: Bytes) -> Result<Option<Frame>, SpdyError> {
        let length = payload.len();
        let need = |least: usize| {
            if length < least { Err(SpdyError::FrameLength { kind: frame_kind, length }) } else { Ok(()) }
        };
        let fin = flags & FLAG_FIN != 0;
        let frame = match frame_kind {
            kind::SYN_STREAM => {
                need(10)?;
                let stream = payload.get_u32() & STREAM_ID;
                payload.advance(6);
                Frame::SynStream { stream, headers: self.inflater.decode(&payload)?, fin }
            }
            kind::SYN_REPLY => {
                need(4)?;
                let stream = payload.get_u32() & STREAM_ID;
                Frame::SynReply { stream, headers: self.inflater.decode(&payload)?, fin }
            }
            kind::HEADERS => {
                need(4)?;
                let stream = payload.get_u32() & STREAM_ID;
                Frame::Headers { stream, headers: self.inflater.decode(&payload)?, fin }
            }
            kind::RST_STREAM => {
                need(8)?;
                Frame::RstStream { stream: payload.get_u32() & STREAM_ID, status: payload.get_u32() }
            }
            kind::PING => {
                need(4)?;
                Frame::Ping(payload.get_u32())
            }
            kind::GOAWAY => {
                need(4)?;
                Frame::GoAway { last_stream: payload.get_u32() & STREAM_ID }
            }
            _ => return Ok(None),
        };
        Ok(Some(frame))
    }
}

/// Largest payload of one data frame that we send; the frame format allows 16 MiB.
pub const MAX_DATA: usize = 32 * 1024;

/// Turns frames into bytes.
pub struct Encoder {
    deflater: super::headers::Deflater,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { deflater: super::headers::Deflater::new() }
    }
}

impl Encoder {
    /// Appends `frame` to `out`; data longer than [`MAX_DATA`] becomes several frames.
    pub fn encode(&mut self, frame: &Frame, out: &mut BytesMut) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { stream, headers, fin } => {
                let block = self.deflater.encode(headers)?;
                control(out, kind::SYN_STREAM, *fin, 10 + block.len());
                out.put_u32(stream & STREAM_ID);
                out.put_slice(&[0; 6]);
                out.put_slice(&block);
            }
            Frame::SynReply { stream, headers, fin } => {
                self.stream_headers(kind::SYN_REPLY, *stream, headers, *fin, out)?
            }
            Frame::Headers { stream, headers, fin } => {
                self.stream_headers(kind::HEADERS, *stream, headers, *fin, out)?
            }
            Frame::Data { stream, data, fin } => encode_data(*stream, data, *fin, out),
            Frame::RstStream { stream, status } => {
                control(out, kind::RST_STREAM, false, 8);
                out.put_u32(stream & STREAM_ID);
                out.put_u32(*status);
            }
            Frame::Ping(id) => {
                control(out, kind::PING, false, 4);
                out.put_u32(*id);
            }
            Frame::GoAway { last_stream } => {
                control(out, kind::GOAWAY, false, 8);
                out.put_u32(last_stream & STREAM_ID);
                out.put_u32(0);
            }
        }
        Ok(())
    }

    fn stream_headers(
        &mut self,
        frame_kind: u16,
        stream: u32,
        headers: &Headers,
        fin: bool,
        out: &mut BytesMut,
    ) -> Result<(), SpdyError> {
        let block = self.deflater.encode(headers)?;
        control(out, frame_kind, fin, 4 + block.len());
        out.put_u32(stream & STREAM_ID);
        out.put_slice(&block);
        Ok(())
    }
}

fn control(out: &mut BytesMut, frame_kind: u16, fin: bool, length: usize) {
    out.put_u16(CONTROL | VERSION);
    out.put_u16(frame_kind);
    flags_and_length(out, fin, length);
}

fn encode_data(stream: u32, data: &Bytes, fin: bool, out: &mut BytesMut) {
    let mut pieces = data.chunks(MAX_DATA).peekable();
    if pieces.peek().is_none() {
        out.put_u32(stream & STREAM_ID);
        flags_and_length(out, fin, 0);
    }
    while let Some(piece) = pieces.next() {
        out.put_u32(stream & STREAM_ID);
        flags_and_length(out, fin && pieces.peek().is_none(), piece.len());
        out.put_slice(piece);
    }
}

/// Callers keep `length` within the 24 bits of the format: header blocks by `MAX_BLOCK`, data by [`MAX_DATA`].
fn flags_and_length(out: &mut BytesMut, fin: bool, length: usize) {
    out.put_u8(if fin { FLAG_FIN } else { 0 });
    out.put_uint(length as u64, 3);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs.iter().copied().collect()
    }

    fn decode_all(bytes: &[u8], step: usize) -> Result<Vec<Frame>, SpdyError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        let mut frames = Vec::new();
        for piece in bytes.chunks(step.max(1)) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.decode(&mut buffer)? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_survive_the_wire_however_it_is_cut() {
        let frames = [
            Frame::SynStream { stream: 1, headers: headers(&[("streamtype", "stdin")]), fin: false },
            Frame::SynReply { stream: 1, headers: Headers::default(), fin: false },
            Frame::Headers { stream: 1, headers: headers(&[("a", "b"), ("a", "c")]), fin: true },
            Frame::RstStream { stream: 3, status: reset::CANCEL },
            Frame::Ping(7),
            Frame::GoAway { last_stream: 9 },
            Frame::Data { stream: 1, data: Bytes::new(), fin: true },
        ];
        let mut encoder = Encoder::default();
        let mut wire = BytesMut::new();
        for frame in &frames {
            encoder.encode(frame, &mut wire).expect("encodable");
        }
        for step in [1, 3, 8, 1000] {
            assert_eq!(decode_all(&wire, step).expect("decodable"), frames, "in steps of {step}");
        }
    }

    #[test]
    fn long_data_is_split_and_ends_once() {
        let data = Bytes::from(vec![7; MAX_DATA * 2 + 5]);
        let mut wire = BytesMut::new();
        Encoder::default().encode(&Frame::Data { stream: 5, data: data.clone(), fin: true }, &mut wire).expect("ok");
        let mut received = Vec::new();
        let mut ends = 0;
        for frame in decode_all(&wire, 4096).expect("decodable") {
            let Frame::Data { stream: 5, data, fin } = frame else { panic!("unexpected {frame:?}") };
            received.extend_from_slice(&data);
            ends += usize::from(fin);
        }
        assert_eq!((received, ends), (data.to_vec(), 1));
    }

    #[test]
    fn malformed_frames_are_errors() {
        let cases: [(&[u8], SpdyError); 4] = [
            (&[0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1], SpdyError::Version(2)),
            (&[0x80, 3, 0, 3, 0, 0, 0, 4, 0, 0, 0, 1], SpdyError::FrameLength { kind: 3, length: 4 }),
            (&[0x80, 3, 0, 1, 0, 255, 255, 255], SpdyError::FrameLength { kind: 1, length: 0xff_ffff }),
            (&[0x80, 3, 0, 2, 0, 0, 0, 6, 0, 0, 0, 1, 1, 2], SpdyError::HeaderCompression),
        ];
        for (wire, expected) in cases {
            assert_eq!(decode_all(wire, wire.len()), Err(expected));
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600), control in any::<bool>()) {
            let mut wire = bytes;
            if control && wire.len() > 8 {
                let head = [0x80, 3, 0, wire[3] % 10, wire[4] & 1, 0, 0, wire[7]];
                wire[..8].copy_from_slice(&head);
            }
            let _ = decode_all(&wire, 17);
        }
    }
}
