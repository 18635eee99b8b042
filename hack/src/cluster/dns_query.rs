//! One DNS question, asked from wherever the process runs; `up` asks it inside a node to see whether DNS answers.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};

pub fn main(server: SocketAddr, name: &str) -> Result<()> {
    let name = Name::from_ascii(name).with_context(|| format!("{name:?} is no DNS name"))?;
    let mut question = Message::query();
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(name, RecordType::A));
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot open a UDP socket")?;
    socket.set_read_timeout(Some(Duration::from_millis(500))).context("cannot set a time limit")?;
    socket.send_to(&question.to_vec().context("cannot encode the question")?, server).context("cannot send")?;
    let mut buffer = [0u8; 4096];
    let (length, _) = socket.recv_from(&mut buffer).context("no answer")?;
    let answer = Message::from_vec(&buffer[..length]).context("the answer is malformed")?;
    if answer.metadata.response_code != ResponseCode::NoError || answer.answers.is_empty() {
        bail!("answered {} with {} records", answer.metadata.response_code, answer.answers.len());
    }
    for record in &answer.answers {
        println!("{record}");
    }
    Ok(())
}
