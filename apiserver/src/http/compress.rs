//! gzip for large answers, chunk by chunk, for clients that ask for it.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http::{HeaderMap, header};

/// Smaller answers are not worth the work; upstream's number.
pub const THRESHOLD: usize = 128 * 1024;

/// Whether the client takes gzip.
pub fn is_wanted(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT_ENCODING).iter().any(|value| {
        let text = value.to_str().unwrap_or_default();
        text.split(',').any(|coding| matches!(coding.split(';').next().map(str::trim), Some("gzip" | "*")))
    })
}

/// The compressed form of a sequence of chunks; never much more than one of them in memory.
pub struct Gzip<I> {
    chunks: I,
    encoder: Option<GzEncoder<Vec<u8>>>,
}

impl<I: Iterator<Item = Bytes>> Gzip<I> {
    pub fn new(chunks: I) -> Self {
        Self { chunks, encoder: Some(GzEncoder::new(Vec::new(), Compression::fast())) }
    }
}

impl<I: Iterator<Item = Bytes>> Iterator for Gzip<I> {
    type Item = std::io::Result<Bytes>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let encoder = self.encoder.as_mut()?;
            let Some(chunk) = self.chunks.next() else {
                return Some(self.encoder.take()?.finish().map(Bytes::from));
            };
            if let Err(error) = encoder.write_all(&chunk) {
                self.encoder = None;
                return Some(Err(error));
            }
            if !encoder.get_ref().is_empty() {
                return Some(Ok(std::mem::take(encoder.get_mut()).into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        let chunks: Vec<Bytes> = (0..50).map(|i| Bytes::from(format!("{i} ").repeat(1000))).collect();
        let packed: Vec<u8> =
            Gzip::new(chunks.clone().into_iter()).flat_map(|chunk| chunk.expect("packs").to_vec()).collect();
        let mut text = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut text).expect("unpacks");
        assert_eq!(text, chunks.concat());
        assert!(packed.len() < text.len() / 10);
    }
}
