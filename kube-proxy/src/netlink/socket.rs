//! A netlink socket to netfilter. The kernel handles a request while it is being sent, so that all answers to it wait
//! in the socket when `send` returns; nothing here waits for anything else.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};

use super::message::{Malformed, Message, messages};
use super::{Builder, flag};

/// Room for the answers of the kernel: a dump is sent in pieces of at most this size.
const RECEIVE: usize = 64 * 1024;
/// Room for refusals of many messages of one batch.
const RECEIVE_QUEUE: usize = 4 * 1024 * 1024;
const DONE: u16 = 3;
const ERROR: u16 = 2;
/// Interrupted dumps are started again so often.
const DUMP_ATTEMPTS: usize = 5;

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error("cannot open a netlink socket to netfilter")]
    Open(#[source] Errno),
    #[error("cannot make room for {bytes} bytes in the netlink socket")]
    Room { bytes: usize, source: Errno },
    #[error("cannot send {bytes} bytes to the kernel")]
    Send { bytes: usize, source: Errno },
    #[error("cannot read the kernel's answer")]
    Receive(#[source] Errno),
    #[error("the kernel's answer cannot be read")]
    Answer(#[from] Malformed),
    #[error("the kernel refuses to list: {0}")]
    Dump(Errno),
    #[error("the listing changed {DUMP_ATTEMPTS} times while it was read")]
    Restless,
}

/// The kernel's word that a message of a batch cannot be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Of the message, or 0 for the batch as a whole.
    pub sequence: u32,
    pub errno: Errno,
}

pub struct Socket {
    fd: OwnedFd,
    send_room: usize,
    buffer: Vec<u8>,
}

impl Socket {
    /// In the network namespace of the calling thread.
    pub fn open() -> Result<Self, NetlinkError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkNetFilter)
            .map_err(NetlinkError::Open)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(NetlinkError::Open)?;
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_QUEUE)
            .map_err(|source| NetlinkError::Room { bytes: RECEIVE_QUEUE, source })?;
        Ok(Self { fd, send_room: 0, buffer: vec![0; RECEIVE] })
    }

    /// Sends messages that do or do not succeed together, and returns the first refusal if there is one.
    pub fn transact(&mut self, batch: &Builder) -> Result<Option<Refusal>, NetlinkError> {
        self.send(batch.bytes())?;
        let mut refused = None;
        while let Some(datagram) = self.receive()? {
            for message in messages(datagram) {
                let message = message?;
                if let Some(errno) = error_of(&message) {
                    refused = refused.or(Some(Refusal { sequence: message.sequence, errno }));
                }
            }
        }
        Ok(refused)
    }

    /// Sends the request for a listing and hands every part of it to `each`, which starts from nothing whenever `begin`
    /// is called.
    pub fn dump<T>(
        &mut self,
        request: &Builder,
        begin: impl Fn() -> T,
        each: impl Fn(&mut T, &Message<'_>),
    ) -> Result<T, NetlinkError> {
        for _ in 0..DUMP_ATTEMPTS {
            self.send(request.bytes())?;
            let mut found = begin();
            if !self.read_dump(&mut found, &each)? {
                return Ok(found);
            }
        }
        Err(NetlinkError::Restless)
    }

    /// Whether the listing changed while it was read.
    fn read_dump<T>(&mut self, found: &mut T, each: &impl Fn(&mut T, &Message<'_>)) -> Result<bool, NetlinkError> {
        let mut interrupted = false;
        // The kernel makes the next part of a listing when the last one is read, so this one waits for nobody either.
        while let Some(datagram) = self.receive()? {
            for message in messages(datagram) {
                let message = message?;
                interrupted |= message.flags & flag::DUMP_INTERRUPTED != 0;
                match message.kind {
                    DONE => return Ok(interrupted),
                    ERROR => match error_of(&message) {
                        Some(Errno::EINTR) => return Ok(true),
                        Some(errno) => return Err(NetlinkError::Dump(errno)),
                        None => return Ok(interrupted),
                    },
                    _ => each(found, &message),
                }
            }
        }
        Ok(interrupted)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), NetlinkError> {
        let room = |source| NetlinkError::Room { bytes: bytes.len(), source };
        // The kernel takes a batch as one piece only.
        let needed = bytes.len() + 4096;
        if needed > self.send_room {
            setsockopt(&self.fd, sockopt::SndBufForce, &needed).map_err(room)?;
            self.send_room = needed;
        }
        send(self.fd.as_raw_fd(), bytes, MsgFlags::empty())
            .map(|_| ())
            .map_err(|source| NetlinkError::Send { bytes: bytes.len(), source })
    }

    /// The next datagram that waits.
    fn receive(&mut self) -> Result<Option<&[u8]>, NetlinkError> {
        match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => Ok(Some(&self.buffer[..length])),
            Err(Errno::EAGAIN) => Ok(None),
            Err(source) => Err(NetlinkError::Receive(source)),
        }
    }
}

/// What an error message says; `None` for acknowledgements and other messages.
fn error_of(message: &Message<'_>) -> Option<Errno> {
    if message.kind != ERROR {
        return None;
    }
    let code = i32::from_ne_bytes(message.payload.get(..4)?.try_into().ok()?);
    (code != 0).then(|| Errno::from_raw(code.saturating_neg()))
}
