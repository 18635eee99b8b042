//! The server with real packets on loopback: UDP, TCP, EDNS, truncation, forwarding, and things that are no DNS.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cluster_dns::forward::Forwarder;
use cluster_dns::model::Model;
use cluster_dns::server::{self, Dns, Metrics};
use cluster_dns::zone::Zone;
use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use parking_lot::RwLock;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;

fn name(text: &str) -> Name {
    Name::from_ascii(text).expect("a name")
}

fn model() -> Model {
    let mut model = Model::default();
    model.set_namespace("default");
    let object = |name: &str, spec: serde_json::Value| {
        serde_json::from_value(json!({"metadata": {"namespace": "default", "name": name}, "spec": spec}))
            .expect("a service")
    };
    model.set_service(&object("kubernetes", json!({"clusterIP": "10.96.0.1"})));
    model.set_service(&object("out", json!({"type": "ExternalName", "externalName": "example.com"})));
    model.set_service(&object("many", json!({"clusterIP": "None"})));
    let endpoints: Vec<_> = (0..200).map(|n| json!({"addresses": [format!("10.244.0.{n}")]})).collect();
    model.set_slice(
        &serde_json::from_value(json!({
            "metadata": {"namespace": "default", "name": "m", "labels": {"kubernetes.io/service-name": "many"}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": [],
        }))
        .expect("a slice"),
    );
    model
}

async fn start(servers: Vec<SocketAddr>) -> SocketAddr {
    let dns = Dns {
        zone: Zone::new(name("cluster.local.")),
        model: Arc::new(RwLock::new(model())),
        forwarder: Forwarder::new(servers),
        metrics: Metrics::default(),
        turn: AtomicUsize::new(0),
    };
    server::start(Arc::new(dns), ([127, 0, 0, 1], 0).into(), CancellationToken::new()).await.expect("listening")
}

/// A server that knows one name and counts how often it is asked.
async fn outside() -> (SocketAddr, Arc<AtomicUsize>) {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    let address = socket.local_addr().expect("an address");
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 1500];
        while let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            count.fetch_add(1, Ordering::SeqCst);
            let query = Message::from_vec(&buffer[..length]).expect("a query");
            let mut answer = Message::response(query.metadata.id, OpCode::Query);
            answer.add_queries(query.queries.clone());
            if query.queries[0].name().to_lowercase() == name("example.com.") {
                answer.add_answer(Record::from_rdata(
                    query.queries[0].name().clone(),
                    60,
                    RData::A(A::new(93, 184, 215, 14)),
                ));
            } else {
                answer.metadata.response_code = ResponseCode::NXDomain;
            }
            socket.send_to(&answer.to_vec().expect("encodable"), from).await.expect("sent");
        }
    });
    (address, asked)
}

fn query(text: &str, wanted: RecordType, payload: Option<u16>) -> Message {
    let mut message = Message::query();
    message.add_query(Query::query(name(text), wanted));
    if let Some(payload) = payload {
        let mut edns = Edns::new();
        edns.set_max_payload(payload);
        message.set_edns(edns);
    }
    message
}

async fn exchange(server: SocketAddr, bytes: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    socket.send_to(bytes, server).await.expect("sent");
    let mut buffer = vec![0; 4096];
    let length = tokio::time::timeout(Duration::from_secs(5), socket.recv(&mut buffer)).await.ok()?.expect("received");
    buffer.truncate(length);
    Some(buffer)
}

async fn ask(server: SocketAddr, message: &Message) -> Message {
    let bytes = exchange(server, &message.to_vec().expect("encodable")).await.expect("an answer");
    let answer = Message::from_vec(&bytes).expect("decodable");
    assert_eq!((answer.metadata.id, &answer.queries), (message.metadata.id, &message.queries));
    answer
}

#[tokio::test]
async fn services_are_answered_with_authority() {
    let server = start(vec![]).await;
    let answer = ask(server, &query("Kubernetes.default.svc.cluster.local.", RecordType::A, None)).await;
    assert!(answer.metadata.authoritative && answer.edns.is_none());
    assert_eq!(answer.answers[0].data, RData::A(A::new(10, 96, 0, 1)));
    let answer = ask(server, &query("nothing.default.svc.cluster.local.", RecordType::A, Some(4096))).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
    assert!(answer.edns.is_some());
    let answer = ask(server, &query("example.com.", RecordType::A, None)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail, "nobody to ask");
}

#[tokio::test]
async fn long_answers_are_cut_and_come_whole_over_tcp() {
    let server = start(vec![]).await;
    let question = query("many.default.svc.cluster.local.", RecordType::A, Some(1232));
    let cut = ask(server, &question).await;
    assert!(cut.metadata.truncation);
    let mut stream = TcpStream::connect(server).await.expect("connected");
    let bytes = question.to_vec().expect("encodable");
    for _ in 0..2 {
        stream.write_u16(u16::try_from(bytes.len()).expect("short")).await.expect("sent");
        stream.write_all(&bytes).await.expect("sent");
        let mut reply = vec![0; usize::from(stream.read_u16().await.expect("a length"))];
        stream.read_exact(&mut reply).await.expect("an answer");
        assert_eq!(Message::from_vec(&reply).expect("decodable").answers.len(), 200);
    }
}

#[tokio::test]
async fn other_names_are_forwarded_and_kept() {
    let (outside, asked) = outside().await;
    let silent: SocketAddr = "127.0.0.1:9".parse().expect("an address");
    let server = start(vec![silent, outside]).await;
    for text in ["example.com.", "EXAMPLE.com."] {
        let answer = ask(server, &query(text, RecordType::A, None)).await;
        assert_eq!(answer.answers[0].data, RData::A(A::new(93, 184, 215, 14)));
        assert!(!answer.metadata.authoritative && answer.metadata.recursion_available);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 1, "the second answer came from the cache");
    let answer = ask(server, &query("out.default.svc.cluster.local.", RecordType::A, None)).await;
    let types: Vec<RecordType> = answer.answers.iter().map(Record::record_type).collect();
    assert_eq!(types, [RecordType::CNAME, RecordType::A]);
    let answer = ask(server, &query("unknown.example.", RecordType::A, None)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
}

#[tokio::test]
async fn nonsense_is_refused_and_harms_nobody() {
    let server = start(vec![]).await;
    let malformed = exchange(server, &[1, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 255]).await.expect("an answer");
    assert_eq!((&malformed[..2], malformed[3] & 15), (&[1u8, 2][..], 1), "FORMERR");
    let mut notify = query("cluster.local.", RecordType::SOA, None);
    notify.metadata.op_code = OpCode::Notify;
    let answer = exchange(server, &notify.to_vec().expect("encodable")).await.expect("an answer");
    assert_eq!(answer[3] & 15, 4, "NOTIMP");
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
    for bytes in [&[][..], &[1], &[0xff; 12], &[0; 11]] {
        socket.send_to(bytes, server).await.expect("sent");
    }
    ask(server, &query("kubernetes.default.svc.cluster.local.", RecordType::A, None)).await;
}
