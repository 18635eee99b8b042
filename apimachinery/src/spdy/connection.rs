//! A SPDY connection over any byte stream: one task reads and dispatches, one writes; streams are plain handles.
//!
//! Every queue is bounded. A stream whose owner does not read holds back its whole connection (there are no
//! windows, see the module's doc); a stream whose owner is gone has its data discarded.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::SpdyError;
use super::frame::{Decoder, Encoder, Frame, reset};
use super::headers::Headers;

/// Pieces of data that wait for the owner of a stream, each at most one read (16 KiB).
const STREAM_QUEUE: usize = 8;
/// Frames that wait for the writer task.
const WRITE_QUEUE: usize = 16;
const READ_SIZE: usize = 16 * 1024;
/// Streams of one connection at one time; more are refused. Kubernetes' clients need five for exec and two per
/// forwarded connection.
const MAX_STREAMS: usize = 1024;

/// Who numbers streams oddly: the client, which sent the upgrade request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Client,
    Server,
}

/// Opens streams. Dropping it (and all streams) closes the connection.
pub struct Connection {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Frame>,
    /// Held while a stream's number is taken and its first frame queued: numbers must go out in ascending order.
    next_stream: tokio::sync::Mutex<u32>,
}

/// Streams that the peer opens.
pub struct Incoming {
    streams: mpsc::Receiver<Stream>,
    _reader: AbortOnDropHandle<()>,
}

impl Incoming {
    /// The peer's next stream; it is not answered until [`Stream::accept`]. `None` when the connection has ended.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }
}

struct Shared {
    streams: Mutex<HashMap<u32, Entry>>,
    closed: CancellationToken,
}

/// What the reader task knows of a stream.
struct Entry {
    data: mpsc::Sender<Bytes>,
    end: Arc<End>,
    reply: Option<oneshot::Sender<()>>,
}

/// How the peer ended its side.
#[derive(Default)]
struct End {
    fin: AtomicBool,
    reset: AtomicBool,
    status: AtomicU32,
}

impl Connection {
    /// Starts speaking SPDY on `io`. The connection lives until the peer ends it or until `Incoming` or every
    /// handle is dropped.
    pub fn start<S>(io: S, role: Role) -> (Self, Incoming)
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read, write) = tokio::io::split(io);
        let (outgoing, frames) = mpsc::channel(WRITE_QUEUE);
        let (accepted, streams) = mpsc::channel(STREAM_QUEUE);
        let shared = Arc::new(Shared { streams: Mutex::default(), closed: CancellationToken::new() });
        tokio::spawn(write_frames(write, frames, shared.closed.clone()));
        let dispatcher = Dispatcher { shared: shared.clone(), outgoing: outgoing.downgrade(), accepted, role };
        let reader = AbortOnDropHandle::new(tokio::spawn(dispatcher.run(read)));
        let next_stream = tokio::sync::Mutex::new(if role == Role::Client { 1 } else { 2 });
        (Self { shared, outgoing, next_stream }, Incoming { streams, _reader: reader })
    }

    /// Opens a stream and waits until the peer has accepted it.
    pub async fn open(&self, headers: Headers) -> Result<Stream, SpdyError> {
        let (reply, replied) = oneshot::channel();
        let stream = {
            let mut next = self.next_stream.lock().await;
            let id = *next;
            *next += 2;
            let (entry, mut stream) = new_stream(id, Headers::default(), &self.outgoing, &self.shared);
            self.shared.streams.lock().insert(id, Entry { reply: Some(reply), ..entry });
            send(&self.outgoing, Frame::SynStream { stream: id, headers: headers.clone(), fin: false }).await?;
            stream.headers = headers;
            stream
        };
        tokio::select! {
            accepted = replied => match accepted {
                Ok(()) => Ok(stream),
                Err(_) => Err(stream.reader.ending().err().unwrap_or(SpdyError::Closed)),
            },
            () = self.shared.closed.cancelled() => Err(SpdyError::Closed),
        }
    }

    /// Completes when the connection has ended, for whatever reason.
    pub async fn closed(&self) {
        self.shared.closed.cancelled().await;
    }
}

async fn send(outgoing: &mpsc::Sender<Frame>, frame: Frame) -> Result<(), SpdyError> {
    outgoing.send(frame).await.map_err(|_| SpdyError::Closed)
}

fn new_stream(id: u32, headers: Headers, outgoing: &mpsc::Sender<Frame>, shared: &Arc<Shared>) -> (Entry, Stream) {
    let (data, received) = mpsc::channel(STREAM_QUEUE);
    let end = Arc::new(End::default());
    let reader = StreamReader { received, end: end.clone() };
    let writer = StreamWriter { id, outgoing: outgoing.clone(), finished: false, shared: shared.clone() };
    (Entry { data, end, reply: None }, Stream { headers, reader, writer })
}

/// Both directions of one stream.
pub struct Stream {
    headers: Headers,
    pub reader: StreamReader,
    pub writer: StreamWriter,
}

impl Stream {
    /// What the opener said about the stream.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Answers the peer that opened this stream; it waits for that before it sends.
    pub async fn accept(&self) -> Result<(), SpdyError> {
        let reply = Frame::SynReply { stream: self.writer.id, headers: Headers::default(), fin: false };
        send(&self.writer.outgoing, reply).await
    }
}

/// The peer's half of a stream.
pub struct StreamReader {
    received: mpsc::Receiver<Bytes>,
    end: Arc<End>,
}

impl StreamReader {
    /// The next piece of data, `None` after the peer's half-close. Cancel-safe.
    pub async fn read(&mut self) -> Result<Option<Bytes>, SpdyError> {
        match self.received.recv().await {
            Some(data) => Ok(Some(data)),
            None => self.ending().map(|()| None),
        }
    }

    fn ending(&self) -> Result<(), SpdyError> {
        if self.end.fin.load(Ordering::Acquire) {
            Ok(())
        } else if self.end.reset.load(Ordering::Acquire) {
            Err(SpdyError::Reset(self.end.status.load(Ordering::Acquire)))
        } else {
            Err(SpdyError::Closed)
        }
    }
}

/// Our half of a stream. Dropped without [`finish`](Self::finish), it resets the stream.
pub struct StreamWriter {
    id: u32,
    outgoing: mpsc::Sender<Frame>,
    finished: bool,
    shared: Arc<Shared>,
}

impl StreamWriter {
    /// Queues data; waits while the connection's write queue is full.
    pub async fn write(&self, data: Bytes) -> Result<(), SpdyError> {
        send(&self.outgoing, Frame::Data { stream: self.id, data, fin: false }).await
    }

    /// Half-closes: the peer reads the end of the stream; we can still read.
    pub async fn finish(&mut self) -> Result<(), SpdyError> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        send(&self.outgoing, Frame::Data { stream: self.id, data: Bytes::new(), fin: true }).await
    }

    /// Ends both directions at once.
    pub async fn reset(mut self) -> Result<(), SpdyError> {
        self.finished = true;
        self.shared.streams.lock().remove(&self.id);
        send(&self.outgoing, Frame::RstStream { stream: self.id, status: reset::CANCEL }).await
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            self.shared.streams.lock().remove(&self.id);
            // A full queue means that the peer does not read: it will see the connection end instead.
            if self.outgoing.try_send(Frame::RstStream { stream: self.id, status: reset::CANCEL }).is_err() {
                tracing::debug!(stream = self.id, "stream dropped without a reset");
            }
        }
    }
}

/// Writes what is queued, as much as possible in one system call, until every sender is gone or the peer is.
async fn write_frames<S: AsyncWrite>(
    mut io: WriteHalf<S>,
    mut frames: mpsc::Receiver<Frame>,
    closed: CancellationToken,
) {
    let mut encoder = Encoder::default();
    let mut buffer = BytesMut::new();
    let mut batch = Vec::with_capacity(WRITE_QUEUE);
    loop {
        let received = tokio::select! {
            biased;
            count = frames.recv_many(&mut batch, WRITE_QUEUE) => count,
            () = closed.cancelled() => 0,
        };
        if received == 0 {
            break;
        }
        for frame in batch.drain(..) {
            // Only a header block of ours that is too large can fail, and a failed one leaves no trace on the wire.
            if let Err(error) = encoder.encode(&frame, &mut buffer) {
                tracing::warn!(%error, "cannot encode a SPDY frame");
            }
        }
        let written = async {
            io.write_all(&buffer).await?;
            io.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "SPDY connection cannot be written");
            break;
        }
        buffer.clear();
        if buffer.capacity() > 64 * 1024 {
            buffer = BytesMut::new();
        }
    }
    closed.cancel();
    if let Err(error) = io.shutdown().await {
        tracing::trace!(%error, "SPDY connection was closed by the peer first");
    }
}

/// The reader task: turns frames into what stream handles see.
struct Dispatcher {
    shared: Arc<Shared>,
    /// Weak, so that the writer ends when all handles are gone.
    outgoing: mpsc::WeakSender<Frame>,
    accepted: mpsc::Sender<Stream>,
    role: Role,
}

impl Drop for Dispatcher {
    /// Whether the connection ended or its owner let go of it: no entry stays, which wakes every reader and opener.
    fn drop(&mut self) {
        self.shared.closed.cancel();
        self.shared.streams.lock().clear();
    }
}

impl Dispatcher {
    async fn run<S: AsyncRead>(self, mut io: ReadHalf<S>) {
        let closed = self.shared.closed.clone();
        let result = tokio::select! {
            result = self.read_frames(&mut io) => result,
            () = closed.cancelled() => Ok(()),
        };
        if let Err(error) = result {
            tracing::debug!(%error, "SPDY connection ended");
        }
    }

    async fn read_frames<S: AsyncRead>(&self, io: &mut ReadHalf<S>) -> Result<(), SpdyError> {
        let mut decoder = Decoder::default();
        let mut buffer = BytesMut::new();
        loop {
            while let Some(frame) = decoder.decode(&mut buffer)? {
                self.dispatch(frame).await?;
            }
            buffer.reserve(READ_SIZE);
            match io.read_buf(&mut buffer).await {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "SPDY connection cannot be read");
                    return Ok(());
                }
            }
        }
    }

    async fn dispatch(&self, frame: Frame) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { stream, headers, fin } => self.opened(stream, headers, fin).await?,
            Frame::SynReply { stream, fin, .. } => {
                let reply = self.shared.streams.lock().get_mut(&stream).and_then(|entry| entry.reply.take());
                if let Some(reply) = reply {
                    // Nobody waits any more when the opener has given up.
                    let _ = reply.send(());
                }
                self.end_if(fin, stream);
            }
            Frame::Headers { stream, fin, .. } => self.end_if(fin, stream),
            Frame::Data { stream, data, fin } => {
                let sender = self.shared.streams.lock().get(&stream).map(|entry| entry.data.clone());
                if let Some(sender) = sender
                    && !data.is_empty()
                {
                    // A gone reader wants nothing more; its writer may still be in use.
                    let _ = sender.send(data).await;
                }
                self.end_if(fin, stream);
            }
            Frame::RstStream { stream, status } => {
                if let Some(entry) = self.shared.streams.lock().remove(&stream) {
                    entry.end.status.store(status, Ordering::Release);
                    entry.end.reset.store(true, Ordering::Release);
                }
            }
            // Answer the peer's pings only, not the answers to ours.
            Frame::Ping(id) => {
                if (id % 2 == 1) != (self.role == Role::Client) {
                    self.reply(Frame::Ping(id)).await?;
                }
            }
            // The peer opens no more streams and accepts none; those that exist run on until it closes.
            Frame::GoAway { last_stream } => tracing::trace!(last_stream, "SPDY peer is going away"),
        }
        Ok(())
    }

    async fn opened(&self, id: u32, headers: Headers, fin: bool) -> Result<(), SpdyError> {
        let ours = (id % 2 == 1) == (self.role == Role::Client);
        let refusal = {
            let streams = self.shared.streams.lock();
            if ours || id == 0 || streams.contains_key(&id) {
                Some(reset::PROTOCOL_ERROR)
            } else if streams.len() >= MAX_STREAMS {
                Some(reset::REFUSED_STREAM)
            } else {
                None
            }
        };
        if let Some(status) = refusal {
            return self.reply(Frame::RstStream { stream: id, status }).await;
        }
        let Some(outgoing) = self.outgoing.upgrade() else { return Err(SpdyError::Closed) };
        let (entry, stream) = new_stream(id, headers, &outgoing, &self.shared);
        self.shared.streams.lock().insert(id, entry);
        self.end_if(fin, id);
        if self.accepted.send(stream).await.is_err() {
            self.shared.streams.lock().remove(&id);
        }
        Ok(())
    }

    /// The peer's half-close: drops the sending side, so that the reader sees the end after the last piece.
    fn end_if(&self, fin: bool, stream: u32) {
        if fin && let Some(entry) = self.shared.streams.lock().remove(&stream) {
            entry.end.fin.store(true, Ordering::Release);
        }
    }

    async fn reply(&self, frame: Frame) -> Result<(), SpdyError> {
        match self.outgoing.upgrade() {
            Some(outgoing) => send(&outgoing, frame).await,
            None => Err(SpdyError::Closed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> ((Connection, Incoming), (Connection, Incoming)) {
        let (a, b) = tokio::io::duplex(1024);
        (Connection::start(a, Role::Client), Connection::start(b, Role::Server))
    }

    fn headers(kind: &str) -> Headers {
        [(super::super::STREAM_TYPE, kind)].into_iter().collect()
    }

    #[tokio::test]
    async fn both_halves_close_apart() {
        let ((client, _client_in), (_server, mut incoming)) = pair();
        let echo = tokio::spawn(async move {
            let mut stream = incoming.next().await.expect("a stream");
            assert_eq!(stream.headers().get("streamType"), Some("data"));
            stream.accept().await.expect("accepted");
            let mut all = Vec::new();
            while let Some(data) = stream.reader.read().await.expect("data") {
                all.extend_from_slice(&data);
            }
            stream.writer.write(Bytes::from(all)).await.expect("written");
            stream.writer.finish().await.expect("finished");
            incoming.next().await.is_none()
        });
        let mut stream = client.open(headers("data")).await.expect("opened");
        let sent = Bytes::from(vec![42; 100_000]);
        stream.writer.write(sent.clone()).await.expect("written");
        stream.writer.finish().await.expect("half-closed");
        let mut received = Vec::new();
        while let Some(data) = stream.reader.read().await.expect("data after our half-close") {
            received.extend_from_slice(&data);
        }
        assert_eq!(received, sent);
        drop((client, _client_in, stream));
        assert!(echo.await.expect("no panic"), "the server sees the end");
    }

    #[tokio::test]
    async fn a_refused_stream_is_an_error_for_its_opener() {
        let ((client, _client_in), (_server, mut incoming)) = pair();
        tokio::spawn(async move {
            while let Some(stream) = incoming.next().await {
                stream.writer.reset().await.expect("reset");
            }
        });
        assert_eq!(client.open(headers("x")).await.err(), Some(SpdyError::Reset(reset::CANCEL)));
    }

    #[tokio::test]
    async fn a_lost_connection_wakes_everyone() {
        let ((client, _client_in), (server, mut incoming)) = pair();
        let accepted = tokio::spawn(async move {
            let stream = incoming.next().await.expect("a stream");
            stream.accept().await.expect("accepted");
            (stream, incoming)
        });
        let mut stream = client.open(headers("x")).await.expect("opened");
        drop(accepted.await.expect("no panic"));
        drop(server);
        assert!(stream.reader.read().await.is_err());
        client.closed().await;
        assert_eq!(client.open(headers("y")).await.err(), Some(SpdyError::Closed));
    }
}
