//! The data path of the udp backend: a tun device whose packets two threads carry over a UDP socket, one for each
//! direction. On the wire every packet is one datagram, as upstream's.
//!
//! The kernel hands over and takes whole runs of TCP segments at once (tun offloads, UDP segmentation), so that most
//! of the work is done once for dozens of packets.

mod packet;

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use ipnet::Ipv4Net;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use quinn_udp::{RecvMeta, Transmit, UdpSocketState};
use tun_rs::{DeviceBuilder, GROTable, SyncDevice, VIRTIO_NET_HDR_LEN};

use packet::Verdict;

/// Where the packets to each subnet go.
pub type Table = BTreeMap<Ipv4Net, SocketAddrV4>;

/// The most that one read of the device can give, and the most that fits into one datagram run.
const LARGEST: usize = 65535;
const LARGEST_RUN: usize = 65000;
/// Runs with smaller segments than this many allow are cut off; TCP sends the rest again.
const SEGMENTS: usize = 512;
/// So many packets go into the device at once.
const BATCH: usize = 128;
/// The socket takes bursts while the thread is busy; the kernel caps it at net.core.rmem_max.
const SOCKET_BUFFER: usize = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("cannot open tun device {name}; does /dev/net/tun exist?")]
    Open { name: String, source: io::Error },
    #[error("cannot listen on UDP {address}, which the udp backend needs; is another flanneld running?")]
    Listen { address: SocketAddrV4, source: io::Error },
    #[error("cannot start the tunnel's threads")]
    Start(#[source] io::Error),
}

/// A tun device that is served. It disappears when the value is dropped.
pub struct Tunnel {
    local: SocketAddrV4,
    address: Ipv4Addr,
    mtu: u32,
    table: Arc<ArcSwap<Table>>,
    broken: Arc<AtomicBool>,
    /// Ends threads that are busy.
    ending: Arc<AtomicBool>,
    /// Closed to end threads that wait.
    stop: Option<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

impl Tunnel {
    pub fn open(name: &str, mtu: u32, local: SocketAddrV4, address: Ipv4Addr) -> Result<Self, TunnelError> {
        let listen = |source| TunnelError::Listen { address: local, source };
        let socket = UdpSocket::bind(local).map_err(listen)?;
        let state = UdpSocketState::new((&socket).into()).map_err(listen)?;
        for result in [
            state.set_recv_buffer_size((&socket).into(), SOCKET_BUFFER),
            state.set_send_buffer_size((&socket).into(), SOCKET_BUFFER),
        ] {
            result.map_err(listen)?;
        }
        let open = |source| TunnelError::Open { name: name.to_owned(), source };
        let device = DeviceBuilder::new().name(name).offload(true).build_sync().map_err(open)?;
        device.set_nonblocking(true).map_err(open)?;
        let (stop, stopped) = UnixStream::pair().map_err(TunnelError::Start)?;
        let table = Arc::new(ArcSwap::default());
        let [broken, ending] = [false, false].map(|value| Arc::new(AtomicBool::new(value)));
        let path = Path {
            device,
            socket,
            state,
            table: Arc::clone(&table),
            address,
            mtu,
            ending: Arc::clone(&ending),
            stopped,
        };
        let path = Arc::new(path);
        let mut tunnel = Self { local, address, mtu, table, broken, ending, stop: Some(stop), threads: Vec::new() };
        tunnel.spawn("tun-to-udp", Arc::clone(&path), Path::outbound)?;
        tunnel.spawn("udp-to-tun", path, Path::inbound)?;
        Ok(tunnel)
    }

    fn spawn(&mut self, name: &str, path: Arc<Path>, run: fn(&Path) -> io::Result<()>) -> Result<(), TunnelError> {
        let broken = Arc::clone(&self.broken);
        let body = move || {
            if let Err(error) = run(&path) {
                tracing::warn!(%error, "the tunnel's device or socket broke");
                broken.store(true, Ordering::Relaxed);
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
        self.threads.push(thread.map_err(TunnelError::Start)?);
        Ok(())
    }

    /// Whether it still is what is wanted, and works.
    pub fn serves(&self, mtu: u32, local: SocketAddrV4, address: Ipv4Addr) -> bool {
        !self.broken.load(Ordering::Relaxed) && (self.mtu, self.local, self.address) == (mtu, local, address)
    }

    pub fn table(&self) -> Table {
        Table::clone(&self.table.load())
    }

    pub fn set_table(&self, table: Table) {
        self.table.store(Arc::new(table));
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        self.stop.take();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// What both threads use.
struct Path {
    device: SyncDevice,
    socket: UdpSocket,
    state: UdpSocketState,
    table: Arc<ArcSwap<Table>>,
    address: Ipv4Addr,
    mtu: u32,
    ending: Arc<AtomicBool>,
    stopped: UnixStream,
}

impl Path {
    /// Waits for one of the events; false when the tunnel ends.
    fn wait(&self, source: &impl AsFd, events: PollFlags) -> io::Result<bool> {
        let mut fds = [PollFd::new(source.as_fd(), events), PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) => return Ok(fds[1].revents().is_none_or(|events| events.is_empty())),
            }
        }
    }

    /// From the device to the other nodes.
    fn outbound(&self) -> io::Result<()> {
        let mut raw = vec![0; VIRTIO_NET_HDR_LEN + LARGEST];
        let mut packets = vec![vec![0; self.mtu as usize]; SEGMENTS];
        let mut sizes = vec![0; SEGMENTS];
        let mut run = Run::default();
        let mut replies = GROTable::default();
        while !self.ending.load(Ordering::Relaxed) {
            let count = match self.device.recv_multiple(&mut raw, &mut packets, &mut sizes, 0) {
                Ok(count) => count,
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        if !self.wait(&self.device, PollFlags::POLLIN)? {
                            return Ok(());
                        }
                        continue;
                    }
                    Some(libc::EINTR) => continue,
                    Some(_) => return Err(error),
                    // What the device gave is not a packet that can be split; the next may be.
                    None => {
                        tracing::debug!(%error, "dropped a packet of the tunnel's device");
                        continue;
                    }
                },
            };
            let table = self.table.load();
            for (packet, &size) in packets.iter_mut().zip(&sizes).take(count) {
                let packet = &mut packet[..size];
                match packet::forward(packet) {
                    Verdict::Forward(destination) => match node(&table, destination) {
                        Some(node) => run.push(node, packet, |node, run, size| self.send(node, run, size)),
                        None => self.refuse(packet, &mut replies)?,
                    },
                    Verdict::Drop => {}
                }
            }
            run.flush(|node, run, size| self.send(node, run, size));
        }
        Ok(())
    }

    /// Tells the sender that there is no way; nothing is lost when the device does not take it.
    fn refuse(&self, packet: &[u8], replies: &mut GROTable) -> io::Result<()> {
        let Some(reply) = packet::unreachable(packet, self.address) else { return Ok(()) };
        let mut buffer = vec![0; VIRTIO_NET_HDR_LEN];
        buffer.extend_from_slice(&reply);
        self.write(&mut [bytes(&buffer)], replies)
    }

    fn send(&self, node: SocketAddrV4, contents: &[u8], segment: usize) {
        let transmit = |contents, segment_size| Transmit {
            destination: node.into(),
            ecn: None,
            contents,
            segment_size,
            src_ip: None,
        };
        match self.state.try_send((&self.socket).into(), &transmit(contents, Some(segment))) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // The socket is full: wait a moment rather than lose a whole run.
                if self.wait(&self.socket, PollFlags::POLLOUT).is_ok_and(|running| running)
                    && let Err(error) = self.state.try_send((&self.socket).into(), &transmit(contents, Some(segment)))
                {
                    tracing::debug!(%error, %node, "dropped packets to a node");
                }
            }
            // A way with a smaller MTU takes no runs; the kernel can cut single datagrams into fragments.
            Err(error) if contents.len() > segment => {
                tracing::debug!(%error, %node, "sending packets one by one");
                contents.chunks(segment).for_each(|packet| self.send(node, packet, packet.len()));
            }
            Err(error) => tracing::debug!(%error, %node, "dropped a packet to a node"),
        }
    }

    /// From the other nodes to the device.
    fn inbound(&self) -> io::Result<()> {
        let mut buffer = vec![0; LARGEST];
        let mut packets: Vec<bytes::BytesMut> = Vec::with_capacity(BATCH);
        let mut table = GROTable::default();
        while !self.ending.load(Ordering::Relaxed) {
            let mut meta = [RecvMeta::default()];
            let received = self.state.recv((&self.socket).into(), &mut [io::IoSliceMut::new(&mut buffer)], &mut meta);
            match received {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(&self.socket, PollFlags::POLLIN)? {
                        return Ok(());
                    }
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // What ICMP says about an earlier packet of ours.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            }
            let [RecvMeta { len, stride, .. }] = meta;
            for packet in buffer[..len].chunks_mut(stride.max(1)) {
                if let Verdict::Forward(_) = packet::forward(packet) {
                    packets.push(with_header(packet));
                }
                if packets.len() == BATCH {
                    self.write(&mut packets, &mut table)?;
                    packets.clear();
                }
            }
            self.write(&mut packets, &mut table)?;
            packets.clear();
        }
        Ok(())
    }

    /// Writes packets, each after room for the device's header. Only a device that is gone is an error.
    fn write(&self, packets: &mut [bytes::BytesMut], table: &mut GROTable) -> io::Result<()> {
        match self.device.send_multiple(table, packets, VIRTIO_NET_HDR_LEN) {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Err(error),
            Err(error) => {
                tracing::debug!(%error, "the tunnel's device did not take packets");
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }
}

fn with_header(packet: &[u8]) -> bytes::BytesMut {
    let mut buffer = bytes::BytesMut::with_capacity(LARGEST.min(VIRTIO_NET_HDR_LEN + packet.len()));
    buffer.resize(VIRTIO_NET_HDR_LEN, 0);
    buffer.extend_from_slice(packet);
    buffer
}

fn bytes(buffer: &[u8]) -> bytes::BytesMut {
    bytes::BytesMut::from(buffer)
}

/// The node that has the address. Subnets do not overlap, so the nearest one below is the only candidate.
fn node(table: &Table, destination: Ipv4Addr) -> Option<SocketAddrV4> {
    let beyond = Ipv4Net::new(destination, 32).ok()?;
    let (subnet, node) = table.range(..=beyond).next_back()?;
    subnet.contains(&destination).then_some(*node)
}

/// Packets to one node that can leave with one call: all of one size, the last perhaps smaller.
#[derive(Default)]
struct Run {
    node: Option<SocketAddrV4>,
    segment: usize,
    contents: Vec<u8>,
}

impl Run {
    fn push(&mut self, node: SocketAddrV4, packet: &[u8], send: impl FnMut(SocketAddrV4, &[u8], usize)) {
        let whole = self.segment != 0 && self.contents.len().is_multiple_of(self.segment);
        let fits = self.node == Some(node)
            && whole
            && packet.len() <= self.segment
            && self.contents.len() + packet.len() <= LARGEST_RUN
            && self.contents.len() / self.segment < 64;
        if !fits {
            self.flush(send);
            (self.node, self.segment) = (Some(node), packet.len());
        }
        self.contents.extend_from_slice(packet);
    }

    fn flush(&mut self, mut send: impl FnMut(SocketAddrV4, &[u8], usize)) {
        if let Some(node) = self.node.take()
            && !self.contents.is_empty()
        {
            send(node, &self.contents, self.segment);
        }
        self.contents.clear();
        self.segment = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_node_is_the_one_whose_subnet_has_the_address() {
        let table: Table = [
            ("10.244.1.0/24".parse().unwrap(), "10.99.0.1:8285".parse().unwrap()),
            ("10.244.3.0/24".parse().unwrap(), "10.99.0.3:8285".parse().unwrap()),
        ]
        .into();
        let find = |address: &str| node(&table, address.parse().unwrap()).map(|node| node.ip().octets()[3]);
        assert_eq!(find("10.244.1.0"), Some(1));
        assert_eq!(find("10.244.3.255"), Some(3));
        assert_eq!(find("10.244.2.9"), None);
        assert_eq!(find("10.243.0.1"), None);
        assert_eq!(find("255.255.255.255"), None);
    }

    #[test]
    fn a_run_is_cut_where_node_or_size_changes() {
        let mut sent = Vec::new();
        let mut run = Run::default();
        let one = "10.99.0.1:8285".parse().unwrap();
        let two = "10.99.0.2:8285".parse().unwrap();
        for (node, size) in [(one, 100), (one, 100), (one, 40), (one, 100), (two, 100), (two, 120)] {
            run.push(node, &vec![0; size], |node, run, size| sent.push((node, run.len(), size)));
        }
        run.flush(|node, run, size| sent.push((node, run.len(), size)));
        assert_eq!(sent, [(one, 240, 100), (one, 100, 100), (two, 100, 100), (two, 120, 120)]);
    }
}
