//! Names of the world outside: asked of other servers, with a small cache.
//!
//! Messages are passed on nearly as they come: the asker's question and EDNS options are kept, the answer's bytes are
//! cached as they are and only get the asker's id and the remaining lifetimes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

/// For one server to answer one question.
const PATIENCE: Duration = Duration::from_secs(2);
/// Questions under way at one time; more are refused rather than queued.
const CONCURRENT: usize = 512;
/// Answers kept.
const CACHE_SIZE: usize = 2048;
/// Longest time that an answer is kept, whatever it says.
const MAX_AGE: u32 = 30;
/// Also the largest message that we accept over UDP; larger ones come by TCP.
const PAYLOAD: u16 = 1232;

#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("no server to forward to")]
    NoServer,
    #[error("too many questions under way")]
    Busy,
    #[error("{server}: {source}")]
    Exchange { server: SocketAddr, source: std::io::Error },
    #[error("{0} does not answer")]
    Silent(SocketAddr),
    #[error("{0} answers something else than was asked")]
    Nonsense(SocketAddr),
    #[error("question cannot be written")]
    Encode,
}

#[derive(Debug, thiserror::Error)]
pub enum ResolvConfError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("--forward {0:?} is neither an address nor a file")]
    Target(String),
}

/// The servers that `targets` name: addresses, addresses with ports, or files like `/etc/resolv.conf`. Those of
/// `ours` are left out, because asking oneself never ends.
pub fn servers(targets: &[String], ours: &[SocketAddr]) -> Result<Vec<SocketAddr>, ResolvConfError> {
    let mut servers = Vec::new();
    for target in targets {
        if let Ok(address) = target.parse::<SocketAddr>() {
            servers.push(address);
        } else if let Ok(address) = target.parse::<IpAddr>() {
            servers.push((address, 53).into());
        } else if target.starts_with('/') {
            let path = Path::new(target);
            let text = std::fs::read_to_string(path)
                .map_err(|source| ResolvConfError::Read { path: path.to_owned(), source })?;
            servers.extend(nameservers(&text));
        } else {
            return Err(ResolvConfError::Target(target.clone()));
        }
    }
    let itself = |server: &SocketAddr| {
        ours.iter().any(|o| {
            o.port() == server.port()
                && (o.ip() == server.ip() || (o.ip().is_unspecified() && server.ip().is_loopback()))
        })
    };
    servers.retain(|server| !itself(server));
    Ok(servers)
}

fn nameservers(resolv_conf: &str) -> Vec<SocketAddr> {
    let lines = resolv_conf.lines().map(str::split_whitespace);
    lines
        .filter_map(|mut words| (words.next()? == "nameserver").then(|| words.next())?)
        .filter_map(|address| address.split('%').next()?.parse::<IpAddr>().ok())
        .map(|address| (address, 53).into())
        .collect()
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Question {
    name: Name,
    wanted: RecordType,
    dnssec: bool,
}

struct Kept {
    answer: Message,
    since: Instant,
    lifetime: u32,
}

pub struct Forwarder {
    servers: Vec<SocketAddr>,
    slots: Semaphore,
    cache: Mutex<HashMap<Question, Kept>>,
}

impl Forwarder {
    pub fn new(servers: Vec<SocketAddr>) -> Self {
        Self { servers, slots: Semaphore::new(CONCURRENT), cache: Mutex::default() }
    }

    /// The answer of the first server that gives one. Its id is arbitrary.
    pub async fn resolve(&self, query: &Query, edns: Option<&Edns>) -> Result<Message, ForwardError> {
        let dnssec = edns.is_some_and(|edns| edns.flags().dnssec_ok);
        let question = Question { name: query.name().to_lowercase(), wanted: query.query_type(), dnssec };
        if let Some(answer) = self.kept(&question) {
            return Ok(answer);
        }
        let _slot = self.slots.try_acquire().map_err(|_| ForwardError::Busy)?;
        let mut last = ForwardError::NoServer;
        for server in &self.servers {
            match ask(*server, query, dnssec).await {
                Ok(answer)
                    if matches!(answer.metadata.response_code, ResponseCode::ServFail | ResponseCode::Refused) =>
                {
                    last = ForwardError::Silent(*server);
                }
                Ok(answer) => {
                    self.keep(question, &answer);
                    return Ok(answer);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn kept(&self, question: &Question) -> Option<Message> {
        let cache = self.cache.lock();
        let kept = cache.get(question)?;
        let age = u32::try_from(kept.since.elapsed().as_secs()).ok()?;
        if age >= kept.lifetime {
            return None;
        }
        let mut answer = kept.answer.clone();
        for record in answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals) {
            record.ttl = record.ttl.saturating_sub(age);
        }
        Some(answer)
    }

    fn keep(&self, question: Question, answer: &Message) {
        let lifetime = lifetime(answer);
        if lifetime == 0 {
            return;
        }
        let mut cache = self.cache.lock();
        if cache.len() >= CACHE_SIZE {
            cache.retain(|_, kept| kept.since.elapsed().as_secs() < u64::from(kept.lifetime));
            if cache.len() >= CACHE_SIZE {
                cache.clear();
            }
        }
        cache.insert(question, Kept { answer: answer.clone(), since: Instant::now(), lifetime });
    }
}

/// Seconds that an answer may be kept: the shortest of its records' lifetimes; for a negative one, what its SOA says.
fn lifetime(answer: &Message) -> u32 {
    if answer.metadata.truncation
        || !matches!(answer.metadata.response_code, ResponseCode::NoError | ResponseCode::NXDomain)
    {
        return 0;
    }
    let positive = answer.answers.iter().map(|record| record.ttl).min();
    let negative = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    let ends_in_nothing = answer.metadata.response_code == ResponseCode::NXDomain || positive.is_none();
    let lifetime = if ends_in_nothing { negative.map(|n| positive.map_or(n, |p| p.min(n))) } else { positive };
    lifetime.unwrap_or(0).min(MAX_AGE)
}

async fn ask(server: SocketAddr, query: &Query, dnssec: bool) -> Result<Message, ForwardError> {
    let mut message = Message::query();
    message.metadata.id = rand::random();
    message.metadata.recursion_desired = true;
    message.add_query(query.clone());
    let mut edns = Edns::new();
    edns.set_max_payload(PAYLOAD).set_dnssec_ok(dnssec);
    message.set_edns(edns);
    let bytes = message.to_vec().map_err(|_| ForwardError::Encode)?;
    let answer = match timeout(PATIENCE, by_udp(server, &bytes, &message)).await {
        Ok(answer) => answer?,
        Err(_) => return Err(ForwardError::Silent(server)),
    };
    if !answer.metadata.truncation {
        return Ok(answer);
    }
    match timeout(PATIENCE, by_tcp(server, &bytes)).await {
        Ok(Ok(reply)) => read_answer(&reply, &message).ok_or(ForwardError::Nonsense(server)),
        Ok(Err(source)) => Err(ForwardError::Exchange { server, source }),
        Err(_) => Err(ForwardError::Silent(server)),
    }
}

/// A socket of its own for each question: its port is as hard to guess as the id.
async fn by_udp(server: SocketAddr, bytes: &[u8], asked: &Message) -> Result<Message, ForwardError> {
    let failed = |source| ForwardError::Exchange { server, source };
    let any: SocketAddr = if server.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any).await.map_err(failed)?;
    socket.connect(server).await.map_err(failed)?;
    socket.send(bytes).await.map_err(failed)?;
    let mut reply = vec![0; usize::from(PAYLOAD) + 1];
    loop {
        let length = socket.recv(&mut reply).await.map_err(failed)?;
        // Anything else than the answer may be an attempt to slip us another.
        if let Some(answer) = read_answer(&reply[..length], asked) {
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(bytes.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), bytes].concat()).await?;
    let length = stream.read_u16().await?;
    let mut reply = vec![0; usize::from(length)];
    stream.read_exact(&mut reply).await?;
    Ok(reply)
}

fn read_answer(bytes: &[u8], asked: &Message) -> Option<Message> {
    let answer = Message::from_vec(bytes).ok()?;
    let ours = answer.metadata.id == asked.metadata.id
        && answer.metadata.message_type == MessageType::Response
        && answer.queries == asked.queries;
    ours.then_some(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::Record;
    use hickory_proto::rr::rdata::{A, SOA};

    #[test]
    fn servers_come_from_addresses_and_files_but_never_are_ourselves() {
        let text = "# comment\nnameserver 10.0.0.2\nsearch x\nnameserver fe80::1%eth0\nnameserver nonsense\n";
        assert_eq!(nameservers(text), ["10.0.0.2:53".parse().expect("ok"), "[fe80::1]:53".parse().expect("ok")]);
        let targets = ["1.1.1.1".to_owned(), "127.0.0.1:53".to_owned(), "127.0.0.1:5353".to_owned()];
        let found = servers(&targets, &["0.0.0.0:53".parse().expect("ok")]).expect("ok");
        assert_eq!(found, ["1.1.1.1:53".parse().expect("ok"), "127.0.0.1:5353".parse().expect("ok")]);
        assert!(servers(&["dns.example".to_owned()], &[]).is_err());
    }

    #[test]
    fn answers_live_as_long_as_they_say_but_not_longer_than_we_like() {
        let name = Name::from_ascii("example.com.").expect("a name");
        let a = |ttl| Record::from_rdata(name.clone(), ttl, RData::A(A::new(1, 2, 3, 4)));
        let soa = |ttl| {
            Record::from_rdata(name.clone(), ttl, RData::SOA(SOA::new(name.clone(), name.clone(), 1, 1, 1, 1, 7)))
        };
        let message = |code, answers: Vec<Record>, authorities: Vec<Record>| {
            let mut message = Message::query().into_response();
            message.metadata.response_code = code;
            message.add_answers(answers).add_authorities(authorities);
            message
        };
        let cases = [
            (message(ResponseCode::NoError, vec![a(20), a(10)], vec![]), 10),
            (message(ResponseCode::NoError, vec![a(3600)], vec![]), MAX_AGE),
            (message(ResponseCode::NXDomain, vec![], vec![soa(100)]), 7),
            (message(ResponseCode::NoError, vec![], vec![soa(3)]), 3),
            (message(ResponseCode::NXDomain, vec![], vec![]), 0),
            (message(ResponseCode::ServFail, vec![a(20)], vec![]), 0),
        ];
        for (answer, expected) in cases {
            assert_eq!(lifetime(&answer), expected, "{answer}");
        }
    }
}
