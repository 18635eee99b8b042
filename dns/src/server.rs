//! DNS over UDP and TCP: reads questions, asks the zone or the forwarder, writes answers. A malformed message gets
//! `FORMERR` when it has an id, else nothing; no message ends the server.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Record, RecordType};
use parking_lot::RwLock;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::forward::Forwarder;
use crate::model::Model;
use crate::zone::{Answer, Zone};

/// Without EDNS no more fits into a UDP answer.
const SMALLEST: u16 = 512;
/// Larger UDP answers than this would be cut into fragments somewhere.
const LARGEST: u16 = 1232;
/// UDP questions that are being forwarded and TCP connections at one time.
const CONCURRENT: usize = 1024;
/// A TCP connection without a question for so long is closed.
const IDLE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: std::io::Error },
}

#[derive(Default)]
pub struct Metrics {
    questions: Counter,
    forwarded: Counter,
    failed: Counter,
}

impl Metrics {
    pub fn register(&self, registry: &mut Registry) {
        registry.register("cluster_dns_questions", "Questions received", self.questions.clone());
        registry.register("cluster_dns_forwarded", "Questions that other servers were asked", self.forwarded.clone());
        registry.register("cluster_dns_failed", "Questions answered with SERVFAIL", self.failed.clone());
    }
}

pub struct Dns {
    pub zone: Zone,
    pub model: Arc<RwLock<Model>>,
    pub forwarder: Forwarder,
    pub metrics: Metrics,
    /// Moves on with every answer, so that its addresses take turns in being the first.
    pub turn: AtomicUsize,
}

/// Listens now, so that a port in use is an error at start, and answers in the background until `shutdown`.
pub async fn start(dns: Arc<Dns>, address: SocketAddr, shutdown: CancellationToken) -> Result<SocketAddr, ServerError> {
    let failed = |source| ServerError::Bind { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    let socket = Arc::new(UdpSocket::bind(bound).await.map_err(failed)?);
    tokio::spawn({
        let (dns, shutdown) = (dns.clone(), shutdown.clone());
        async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = serve_udp(dns, socket) => {}
            }
        }
    });
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = serve_tcp(dns, listener) => {}
        }
    });
    Ok(bound)
}

async fn serve_udp(dns: Arc<Dns>, socket: Arc<UdpSocket>) {
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    let mut buffer = vec![0; 4096];
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                // The error of an earlier answer whose asker is gone; there is no other kind that passes.
                tracing::debug!(%error, "cannot receive");
                tokio::task::yield_now().await;
                continue;
            }
        };
        let request = match Request::read(&buffer[..length]) {
            Ok(request) => request,
            Err(refusal) => {
                send(&socket, refusal.map(|message| *message), SMALLEST, from).await;
                continue;
            }
        };
        let limit = request.payload();
        // What the model answers is answered at once; only what takes time gets a task.
        if let Some(answer) = dns.at_once(&request) {
            send(&socket, Some(answer), limit, from).await;
        } else if let Ok(slot) = slots.clone().try_acquire_owned() {
            let (dns, socket) = (dns.clone(), socket.clone());
            tokio::spawn(async move {
                send(&socket, Some(dns.in_time(&request).await), limit, from).await;
                drop(slot);
            });
        } else {
            send(&socket, Some(request.failure(ResponseCode::ServFail)), limit, from).await;
        }
    }
}

async fn send(socket: &UdpSocket, answer: Option<Message>, limit: u16, to: SocketAddr) {
    let Some(bytes) = answer.and_then(|answer| encode(&answer, usize::from(limit))) else { return };
    if let Err(error) = socket.send_to(&bytes, to).await {
        tracing::debug!(%error, %to, "cannot send");
    }
}

async fn serve_tcp(dns: Arc<Dns>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let dns = dns.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve_stream(&dns, stream).await {
                        tracing::debug!(%error, "connection ended");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_stream(dns: &Dns, mut stream: TcpStream) -> std::io::Result<()> {
    let mut message = Vec::new();
    loop {
        let read = async {
            let length = stream.read_u16().await?;
            message.resize(usize::from(length), 0);
            stream.read_exact(&mut message).await
        };
        match timeout(IDLE, read).await {
            Ok(read) => read?,
            Err(_) => return Ok(()),
        };
        let answer = match Request::read(&message) {
            Ok(request) => match dns.at_once(&request) {
                Some(answer) => Some(answer),
                None => Some(dns.in_time(&request).await),
            },
            Err(refusal) => refusal.map(|message| *message),
        };
        let Some(bytes) = answer.and_then(|answer| encode(&answer, usize::from(u16::MAX))) else { return Ok(()) };
        let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
        timeout(IDLE, stream.write_all(&[&length.to_be_bytes(), bytes.as_slice()].concat())).await??;
    }
}

/// The bytes of an answer; one that is too long is cut to its question, which makes the asker come by TCP.
fn encode(answer: &Message, limit: usize) -> Option<Vec<u8>> {
    let mut bytes = answer.to_vec();
    if bytes.as_ref().is_ok_and(|bytes| bytes.len() > limit) {
        bytes = answer.truncate().to_vec();
    }
    bytes.inspect_err(|error| tracing::warn!(%error, "answer cannot be written")).ok()
}

/// A message that asks one thing.
struct Request {
    message: Message,
    query: Query,
}

impl Request {
    /// `Err` holds what to answer to something else, if anything.
    fn read(bytes: &[u8]) -> Result<Self, Option<Box<Message>>> {
        let Ok(message) = Message::from_vec(bytes) else {
            // The id is all that is sure, and a response is never answered.
            let [a, b, flags, ..] = bytes else { return Err(None) };
            let malformed = Message::error_msg(u16::from_be_bytes([*a, *b]), OpCode::Query, ResponseCode::FormErr);
            return Err((flags & 0x80 == 0 && bytes.len() >= 12).then(|| Box::new(malformed)));
        };
        if message.metadata.message_type == MessageType::Response {
            return Err(None);
        }
        let (id, op_code) = (message.metadata.id, message.metadata.op_code);
        if op_code != OpCode::Query {
            return Err(Some(Box::new(Message::error_msg(id, op_code, ResponseCode::NotImp))));
        }
        match message.queries.as_slice() {
            [query] => {
                let query = query.clone();
                let request = Self { message, query };
                if request.message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
                    return Err(Some(Box::new(request.failure(ResponseCode::BADVERS))));
                }
                Ok(request)
            }
            _ => Err(Some(Box::new(Message::error_msg(id, op_code, ResponseCode::FormErr)))),
        }
    }

    fn payload(&self) -> u16 {
        self.message.edns.as_ref().map_or(SMALLEST, |edns| edns.max_payload().clamp(SMALLEST, LARGEST))
    }

    /// An empty answer to this request.
    fn reply(&self) -> Message {
        let mut reply = Message::response(self.message.metadata.id, OpCode::Query);
        reply.metadata.recursion_desired = self.message.metadata.recursion_desired;
        reply.metadata.recursion_available = true;
        reply.add_query(self.query.clone());
        if let Some(asked) = &self.message.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(LARGEST).set_dnssec_ok(asked.flags().dnssec_ok);
            reply.set_edns(edns);
        }
        reply
    }

    fn failure(&self, code: ResponseCode) -> Message {
        let mut reply = self.reply();
        reply.metadata.response_code = code;
        if let Some(edns) = &mut reply.edns {
            edns.set_rcode_high(code.high());
        }
        reply
    }
}

impl Dns {
    /// The answer when nobody else has to be asked.
    fn at_once(&self, request: &Request) -> Option<Message> {
        let query = &request.query;
        if query.query_class() != DNSClass::IN {
            self.metrics.questions.inc();
            return Some(request.failure(ResponseCode::Refused));
        }
        let answer = self.zone.answer(&self.model.read(), query.name(), query.query_type())?;
        if answer.follow.is_some() {
            return None;
        }
        self.metrics.questions.inc();
        Some(self.authoritative(request, answer))
    }

    /// The answer for which another server is asked.
    async fn in_time(&self, request: &Request) -> Message {
        self.metrics.questions.inc();
        self.metrics.forwarded.inc();
        let query = &request.query;
        let alias = self.zone.answer(&self.model.read(), query.name(), query.query_type());
        let asked = match alias.as_ref().and_then(|answer| answer.follow.clone()) {
            Some(target) => Query::query(target, query.query_type()),
            None => query.clone(),
        };
        let resolved = match self.forwarder.resolve(&asked, request.message.edns.as_ref()).await {
            Ok(resolved) => resolved,
            Err(error) => {
                tracing::debug!(%error, name = %asked.name(), "cannot resolve");
                self.metrics.failed.inc();
                return match alias {
                    // An alias is an answer even when what it leads to is not known.
                    Some(alias) => self.authoritative(request, alias),
                    None => request.failure(ResponseCode::ServFail),
                };
            }
        };
        let mut reply = request.reply();
        reply.metadata.response_code = resolved.metadata.response_code;
        reply.metadata.authentic_data = resolved.metadata.authentic_data;
        reply.add_answers(alias.into_iter().flat_map(|alias| alias.records));
        reply.add_answers(resolved.answers);
        reply.add_authorities(resolved.authorities);
        reply.add_additionals(resolved.additionals);
        reply
    }

    fn authoritative(&self, request: &Request, mut answer: Answer) -> Message {
        let mut reply = request.reply();
        reply.metadata.authoritative = true;
        reply.metadata.response_code = answer.code;
        if answer.records.is_empty() {
            reply.add_authority(self.zone.soa(serial()));
        }
        self.take_turns(&mut answer.records);
        reply.add_answers(answer.records);
        reply.add_additionals(answer.additionals);
        reply
    }

    /// Rotates a list of addresses; anything that follows an alias stays behind it.
    fn take_turns(&self, records: &mut [Record]) {
        let is_address = |record: &Record| matches!(record.record_type(), RecordType::A | RecordType::AAAA);
        if records.len() > 1 && records.iter().all(is_address) {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed) % records.len();
            records.rotate_left(turn);
        }
    }
}

/// The zone has changed as far as anyone can tell: it is made anew from the cluster's state all the time.
fn serial() -> u32 {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    u32::try_from(seconds & u64::from(u32::MAX)).unwrap_or_default()
}
