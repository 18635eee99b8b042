//! SPDY/3.1 as container runtimes and older Kubernetes clients speak it for exec, attach and port-forward: several
//! byte streams, each with headers and a half-close in either direction, over one upgraded HTTP/1.1 connection.
//!
//! [`frame`] and [`headers`] are pure codecs; [`Connection`] runs them over any byte stream, as client or server.
//! There is no HTTP here, and no flow control by windows: the field's implementation (moby/spdystream) never sends
//! `WINDOW_UPDATE`, so a sender that waited for one would wait for ever. A slow reader is held back by TCP instead.

mod connection;
pub mod frame;
pub mod headers;

pub use connection::{Connection, Incoming, Role, Stream, StreamReader, StreamWriter};

/// The header that tells exec, attach and port-forward streams of one connection apart.
pub const STREAM_TYPE: &str = "streamtype";

/// What can go wrong on a connection or on one of its streams.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpdyError {
    #[error("frame of version {0}, only SPDY/3 is spoken")]
    Version(u16),
    #[error("control frame of type {kind} has {length} bytes, which cannot be right")]
    FrameLength { kind: u16, length: usize },
    #[error("header block cannot be decompressed")]
    HeaderCompression,
    #[error("header block is malformed or larger than {} bytes", headers::MAX_BLOCK)]
    HeaderBlock,
    #[error("stream was reset by the peer (status {0})")]
    Reset(u32),
    #[error("connection ended")]
    Closed,
}
