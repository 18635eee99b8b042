//! What a router does to an IPv4 packet: one hop less to live, and an answer when there is no way.

use std::net::Ipv4Addr;

const HEADER: usize = 20;
const ICMP: u8 = 1;
/// Destination unreachable: network.
const UNREACHABLE: [u8; 2] = [3, 0];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// On the way to this address.
    Forward(Ipv4Addr),
    /// Not IPv4, or it has lived long enough.
    Drop,
}

/// Takes one hop from the packet's life.
pub fn forward(packet: &mut [u8]) -> Verdict {
    let Some(header) = packet.first_chunk_mut::<HEADER>() else { return Verdict::Drop };
    if header[0] >> 4 != 4 || header[8] <= 1 {
        return Verdict::Drop;
    }
    header[8] -= 1;
    // RFC 1624: the sum grows by what the word with the lifetime lost.
    let sum = u32::from(u16::from_be_bytes([header[10], header[11]])) + 0x100;
    let sum = (sum & 0xffff) + (sum >> 16);
    [header[10], header[11]] = (sum as u16).to_be_bytes();
    Verdict::Forward(Ipv4Addr::new(header[16], header[17], header[18], header[19]))
}

/// The answer "network unreachable" to a packet's sender, with the packet's header and the first 8 bytes after it.
/// None for answers themselves, for later fragments and for what is not a packet.
pub fn unreachable(offender: &[u8], from: Ipv4Addr) -> Option<Vec<u8>> {
    let first = *offender.first()?;
    let length = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || length < HEADER || offender.len() < length + 8 {
        return None;
    }
    let fragment = u16::from_be_bytes([offender[6], offender[7]]) & 0x1fff;
    if fragment != 0 || offender[9] == ICMP {
        return None;
    }
    let quoted = &offender[..length + 8];
    let total = u16::try_from(HEADER + 8 + quoted.len()).ok()?;
    let mut reply = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, ICMP, 0, 0];
    reply[2..4].copy_from_slice(&total.to_be_bytes());
    reply.extend_from_slice(&from.octets());
    reply.extend_from_slice(&offender[12..16]);
    let sum = checksum(&reply);
    reply[10..12].copy_from_slice(&sum.to_be_bytes());
    reply.extend_from_slice(&UNREACHABLE);
    reply.extend_from_slice(&[0; 6]);
    reply.extend_from_slice(quoted);
    let sum = checksum(&reply[HEADER..]);
    reply[HEADER + 2..HEADER + 4].copy_from_slice(&sum.to_be_bytes());
    Some(reply)
}

/// The Internet checksum.
fn checksum(data: &[u8]) -> u16 {
    let words = data.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(ttl: u8, protocol: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, ttl, protocol, 0, 0, 10, 244, 1, 2, 10, 244, 2, 3];
        let sum = checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&[7; 20]);
        packet
    }

    #[test]
    fn the_header_stays_right_for_every_lifetime() {
        for ttl in 2..=255 {
            let mut packet = packet(ttl, 6);
            assert_eq!(forward(&mut packet), Verdict::Forward(Ipv4Addr::new(10, 244, 2, 3)));
            assert_eq!((packet[8], checksum(&packet[..HEADER])), (ttl - 1, 0), "{ttl}");
        }
    }

    #[test]
    fn what_is_old_or_no_packet_is_dropped() {
        assert_eq!(forward(&mut packet(1, 6)), Verdict::Drop);
        assert_eq!(forward(&mut packet(0, 6)), Verdict::Drop);
        assert_eq!(forward(&mut [0x45; 19]), Verdict::Drop);
        assert_eq!(forward(&mut [0x60; 40]), Verdict::Drop);
        assert_eq!(forward(&mut []), Verdict::Drop);
    }

    #[test]
    fn the_answer_quotes_the_packet() {
        let from = Ipv4Addr::new(10, 244, 1, 0);
        let reply = unreachable(&packet(63, 6), from).unwrap();
        assert_eq!((reply.len(), checksum(&reply[..HEADER]), checksum(&reply[HEADER..])), (56, 0, 0));
        assert_eq!(reply[12..20], [10, 244, 1, 0, 10, 244, 1, 2]);
        assert_eq!(reply[28..56], packet(63, 6)[..28]);
    }

    #[test]
    fn no_answer_to_answers_fragments_and_junk() {
        let from = Ipv4Addr::new(10, 244, 1, 0);
        let mut fragment = packet(63, 6);
        fragment[7] = 5;
        let mut long_header = packet(63, 6);
        long_header[0] = 0x4f;
        for bad in [packet(63, ICMP), fragment, long_header, vec![], vec![0x45; 27], vec![0x41; 60]] {
            assert_eq!(unreachable(&bad, from), None);
        }
    }
}
