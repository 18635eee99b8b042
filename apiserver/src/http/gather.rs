//! Writes of one connection, gathered until they are flushed. HTTP/2 writes every frame for itself, and TLS makes a
//! system call of every write; many streams with something to say at once are better served by one.
//!
//! Only for connections whose writer says when it is done (HTTP/2 does); what is upgraded to another protocol may not.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// More than this is not held back: as much as TLS takes at once.
const LIMIT: usize = 64 * 1024;

pub struct Gather<S> {
    stream: S,
    /// Pass everything on as it comes.
    direct: bool,
    held: Vec<u8>,
    /// How much of `held` has been written.
    written: usize,
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    pub fn new(stream: S, direct: bool) -> Self {
        Self { stream, direct, held: Vec::new(), written: 0 }
    }

    /// Writes what is held; its memory goes with it, since most connections are idle most of the time.
    fn poll_release(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.held.len() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.held[self.written..]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        (self.held, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.as_mut().poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.direct {
            return Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        }
        let length = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        if !self.held.is_empty() && self.held.len() + length > LIMIT {
            ready!(self.poll_release(cx))?;
        }
        bufs.iter().for_each(|buf| self.held.extend_from_slice(buf));
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        !self.direct || self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(cx))?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_release(cx))?;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn nothing_is_lost_or_held_beyond_a_flush() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mut gather = Gather::new(near, false);
        gather.write_all(b"one ").await.expect("writes");
        assert!(futures::poll!(std::pin::pin!(far.read_u8())).is_pending(), "held until the flush");
        gather.write_all(b"two").await.expect("writes");
        gather.flush().await.expect("flushes");
        let mut seen = [0; 7];
        far.read_exact(&mut seen).await.expect("reads");
        assert_eq!((&seen, gather.held.capacity()), (b"one two", 0));
        let large = vec![7; 3 * LIMIT];
        gather.write_all(&large).await.expect("writes");
        gather.write_all(b"end").await.expect("writes");
        gather.shutdown().await.expect("ends");
        let mut rest = Vec::new();
        far.read_to_end(&mut rest).await.expect("reads");
        assert_eq!((rest.len(), &rest[3 * LIMIT..]), (3 * LIMIT + 3, &b"end"[..]));
    }

    #[tokio::test]
    async fn what_may_not_be_held_is_passed_on() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut gather = Gather::new(near, true);
        gather.write_all(b"x").await.expect("writes");
        assert_eq!(far.read_u8().await.expect("reads"), b'x');
    }
}
