//! Exec and attach: SPDY and older WebSocket clients are passed through to the container runtime, `v5` WebSocket
//! clients are translated. A `v5` message is one byte of channel and its data; channel 255 closes the channel that
//! its one byte of data names.

use apimachinery::spdy::headers::Headers;
use apimachinery::spdy::{
    Connection, Incoming as SpdyIncoming, Role, STREAM_TYPE, SpdyError, StreamReader, StreamWriter,
};
use apimachinery::status::Status;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

use super::websocket::{self, Sink, Source};
use super::{StreamError, Upgrade, V5, offered, passthrough, upgrade_of};
use crate::server::body::Body;
use crate::server::query_pairs;

mod channel {
    pub const STDIN: u8 = 0;
    pub const STDOUT: u8 = 1;
    pub const STDERR: u8 = 2;
    pub const ERROR: u8 = 3;
    pub const RESIZE: u8 = 4;
    pub const CLOSE: u8 = 255;
}

/// The SPDY protocol in which the runtime reports exit codes; all runtimes since 2016 speak it.
const RUNTIME_PROTOCOL: &str = "v4.channel.k8s.io";

/// The streams that a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

impl Streams {
    /// From the query, by the names that API servers use (`input=1`) and those of the pods API (`stdin=true`).
    pub fn parse(query: &str) -> Result<Self, StreamError> {
        let mut streams = Self::default();
        for (name, value) in query_pairs(query) {
            let wanted = matches!(value.as_str(), "1" | "true");
            match name.as_str() {
                "input" | "stdin" => streams.stdin = wanted,
                "output" | "stdout" => streams.stdout = wanted,
                "error" | "stderr" => streams.stderr = wanted,
                "tty" => streams.tty = wanted,
                _ => {}
            }
        }
        let streams = streams.with_tty(streams.tty);
        if streams.stdin || streams.stdout || streams.stderr { Ok(streams) } else { Err(StreamError::NoStreams) }
    }

    /// With a terminal everything comes on stdout.
    pub fn with_tty(self, tty: bool) -> Self {
        Self { tty, stderr: self.stderr && !tty, ..self }
    }
}

pub async fn serve(request: Request<Incoming>, url: &str, streams: Streams) -> Result<Response<Body>, StreamError> {
    let translate = upgrade_of(&request)? == Upgrade::WebSocket
        && offered(&request, "sec-websocket-protocol").iter().any(|p| p == V5);
    if translate { translated(request, url, streams).await } else { passthrough::serve(request, url).await }
}

async fn translated(
    mut request: Request<Incoming>,
    url: &str,
    streams: Streams,
) -> Result<Response<Body>, StreamError> {
    let like = Request::post("/").header("upgrade", "SPDY/3.1").header("x-stream-protocol-version", RUNTIME_PROTOCOL);
    let like = like.body(()).map_err(|_| StreamError::NoUpgrade)?;
    let answer = passthrough::request(url, &like).await?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(StreamError::Refused(answer.status()));
    }
    let runtime = hyper::upgrade::on(answer).await?;
    let (response, upgrade) = websocket::accept(&mut request, V5)?;
    tokio::spawn(async move {
        match upgrade.await {
            Ok(client) => translate(client, runtime, streams).await,
            Err(error) => tracing::debug!(%error, "session was not upgraded"),
        }
    });
    Ok(response)
}

async fn translate(client: Upgraded, runtime: Upgraded, streams: Streams) {
    let (sink, source) = websocket::socket(client).await;
    let (output, messages) = mpsc::channel(4);
    let writer = tokio::spawn(write_messages(sink, messages));
    let session = async {
        let (mut session, _incoming) = Session::open(runtime, streams).await?;
        // An empty message tells the client that the session is up.
        let first = if streams.stdout { channel::STDOUT } else { channel::STDERR };
        let up = if streams.stdout || streams.stderr { first } else { channel::ERROR };
        forward(&output, up, Bytes::new()).await;
        session.run(source, &output).await
    };
    if let Err(error) = session.await {
        let status = Status::internal(format_args!("error streaming to the container runtime: {error}"));
        forward(&output, channel::ERROR, Bytes::from(status.to_json().to_string())).await;
    }
    drop(output);
    if let Err(error) = writer.await {
        tracing::warn!(%error, "the task that writes to a client failed");
    }
}

async fn forward(output: &mpsc::Sender<Message>, to: u8, data: Bytes) {
    let mut message = BytesMut::with_capacity(data.len() + 1);
    message.put_u8(to);
    message.put_slice(&data);
    // The writer ends when the client is gone, which the reading side notices too.
    let _ = output.send(Message::Binary(message.freeze())).await;
}

async fn write_messages(mut sink: Sink, mut messages: mpsc::Receiver<Message>) {
    while let Some(message) = messages.recv().await {
        if let Err(error) = sink.send(message).await {
            return tracing::debug!(%error, "client is gone");
        }
    }
    if let Err(error) = websocket::end(&mut sink).await {
        tracing::trace!(%error, "client closed first");
    }
}

/// The runtime's side of a session.
struct Session {
    _connection: Connection,
    stdin: Option<StreamWriter>,
    resize: Option<StreamWriter>,
    outputs: Vec<(u8, StreamReader)>,
    /// Our halves of the streams that only the runtime writes to; dropping them would reset the streams.
    _silent: Vec<StreamWriter>,
}

impl Session {
    async fn open(runtime: Upgraded, streams: Streams) -> Result<(Self, SpdyIncoming), SpdyError> {
        let (connection, incoming) = Connection::start(TokioIo::new(runtime), Role::Client);
        let open = async |name: &str| connection.open(Headers::from_iter([(STREAM_TYPE, name)])).await;
        let (mut outputs, mut silent) = (Vec::new(), Vec::new());
        let error = open("error").await?;
        outputs.push((channel::ERROR, error.reader));
        silent.push(error.writer);
        let stdin = if streams.stdin { Some(open("stdin").await?.writer) } else { None };
        for (wanted, name, to) in
            [(streams.stdout, "stdout", channel::STDOUT), (streams.stderr, "stderr", channel::STDERR)]
        {
            if wanted {
                let stream = open(name).await?;
                outputs.push((to, stream.reader));
                silent.push(stream.writer);
            }
        }
        let resize = if streams.tty { Some(open("resize").await?.writer) } else { None };
        Ok((Self { _connection: connection, stdin, resize, outputs, _silent: silent }, incoming))
    }

    /// Runs until the runtime has ended all its streams or the client is gone.
    async fn run(&mut self, source: Source, output: &mpsc::Sender<Message>) -> Result<(), SpdyError> {
        let outputs = std::mem::take(&mut self.outputs);
        let outward = futures::future::join_all(outputs.into_iter().map(|(to, reader)| copy_out(to, reader, output)));
        let mut inward = std::pin::pin!(copy_in(source, self.stdin.take(), self.resize.take()));
        let mut outward = std::pin::pin!(outward);
        tokio::select! {
            ended = &mut outward => ended.into_iter().collect(),
            failed = &mut inward => match failed {
                // A command that takes no more input still has output to give.
                Err(error) => {
                    tracing::debug!(%error, "session takes no more input");
                    outward.await.into_iter().collect()
                }
                Ok(()) => Ok(()),
            },
        }
    }
}

/// Copies until the runtime ends the stream, which it does by a half-close or, when all is done, by resetting it.
/// The runtime has said how the session ended when the error stream carried anything; nothing is lost then.
async fn copy_out(to: u8, mut reader: StreamReader, output: &mpsc::Sender<Message>) -> Result<(), SpdyError> {
    let mut silent = true;
    loop {
        match reader.read().await {
            Ok(Some(data)) => {
                silent = false;
                forward(output, to, data).await;
            }
            Ok(None) | Err(SpdyError::Reset(_)) => return Ok(()),
            Err(error) if to == channel::ERROR && silent => return Err(error),
            Err(_) => return Ok(()),
        }
    }
}

/// Returns `Ok` when the client has left, an error when the runtime takes no more.
async fn copy_in(
    mut source: Source,
    mut stdin: Option<StreamWriter>,
    resize: Option<StreamWriter>,
) -> Result<(), SpdyError> {
    while let Some(message) = source.next().await {
        let data = match message {
            Ok(Message::Binary(data)) => data,
            Ok(Message::Close(_)) => break,
            Ok(_) => continue,
            Err(error) => {
                tracing::debug!(%error, "client is gone");
                break;
            }
        };
        let Some((to, data)) = data.split_first().map(|(to, _)| (*to, data.slice(1..))) else { continue };
        match (to, &mut stdin, &resize) {
            (channel::STDIN, Some(stdin), _) => stdin.write(data).await?,
            (channel::RESIZE, _, Some(resize)) => resize.write(data).await?,
            (channel::CLOSE, Some(stdin), _) if data.first() == Some(&channel::STDIN) => stdin.finish().await?,
            _ => tracing::debug!(channel = to, "message on a channel that the session does not have"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_no_stderr_and_nothing_is_an_error() {
        let streams = |stdin, stdout, stderr, tty| Some(Streams { stdin, stdout, stderr, tty });
        let cases = [
            ("input=1&output=1&error=1&command=sh", streams(true, true, true, false)),
            ("output=1&error=1&tty=1", streams(false, true, false, true)),
            ("stdout=true", streams(false, true, false, false)),
            ("error=1&tty=1", None),
            ("output=0", None),
            ("", None),
        ];
        for (query, expected) in cases {
            assert_eq!(Streams::parse(query).ok(), expected, "{query}");
        }
    }
}
