//! Header blocks of SPDY/3: name-value lists, compressed by one zlib stream per direction that lives as long as the
//! connection and starts from a dictionary that both sides know.

use std::sync::LazyLock;

use bytes::{Buf, BufMut, Bytes};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::SpdyError;

/// A decompressed block beyond this is refused; it bounds what a few hostile bytes can unfold to.
pub const MAX_BLOCK: usize = 64 * 1024;

/// Words of the SPDY/3 dictionary; each is preceded by its length in four bytes.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language \
    accept-ranges age allow authorization cache-control connection content-base content-encoding content-language \
    content-length content-location content-md5 content-range content-type date etag expect expires from host if-match \
    if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma \
    proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade \
    user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
    keep-alive origin";

/// What follows the words, without lengths.
const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505\
    203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden\
    404 Not Found500 Internal Server Error501 Not Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug \
    Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,text/html,image/png,image/jpg,image/gif,\
    application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,deflate,sdch\
    charset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut dictionary = Vec::with_capacity(1423);
    for word in WORDS.split(' ').map(|w| w.replace('_', " ")) {
        dictionary.put_u32(word.len() as u32);
        dictionary.put_slice(word.as_bytes());
    }
    dictionary.put_slice(TAIL.as_bytes());
    dictionary
});

/// Headers of a stream, in order; names are lower case as on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Headers(Vec<(String, String)>);

impl Headers {
    /// The first value of `name`, whatever its case.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Headers {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(pairs: I) -> Self {
        Self(pairs.into_iter().map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect())
    }
}

/// Decompresses the header blocks that one side sends.
pub(super) struct Inflater(Decompress);

impl Inflater {
    pub(super) fn new() -> Self {
        Self(Decompress::new(true))
    }

    pub(super) fn decode(&mut self, compressed: &[u8]) -> Result<Headers, SpdyError> {
        parse(Bytes::from(self.inflate(compressed)?))
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut block = Vec::with_capacity(1024);
        loop {
            if block.len() == block.capacity() {
                if block.len() >= MAX_BLOCK {
                    return Err(SpdyError::HeaderBlock);
                }
                block.reserve(block.len());
            }
            let before = (self.0.total_in(), block.len());
            let result = self.0.decompress_vec(input, &mut block, FlushDecompress::Sync);
            let consumed = (self.0.total_in() - before.0) as usize;
            input = input.get(consumed..).ok_or(SpdyError::HeaderCompression)?;
            match result {
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0.set_dictionary(&DICTIONARY).map_err(|_| SpdyError::HeaderCompression)?;
                }
                Err(_) | Ok(Status::StreamEnd) => return Err(SpdyError::HeaderCompression),
                // Room left in the output and nothing left of the input: the block is complete.
                Ok(_) if input.is_empty() && block.len() < block.capacity() => return Ok(block),
                Ok(_) if consumed == 0 && block.len() == before.1 && block.len() < block.capacity() => {
                    return Err(SpdyError::HeaderCompression);
                }
                Ok(_) => {}
            }
        }
    }
}

fn parse(mut block: Bytes) -> Result<Headers, SpdyError> {
    let count = take_u32(&mut block)?;
    let mut headers = Vec::new();
    for _ in 0..count {
        let name = take_text(&mut block)?;
        // Several values of one name share one entry, separated by NUL.
        for value in take_text(&mut block)?.split('\0') {
            headers.push((name.clone(), value.to_owned()));
        }
    }
    Ok(Headers(headers))
}

fn take_u32(block: &mut Bytes) -> Result<u32, SpdyError> {
    block.try_get_u32().map_err(|_| SpdyError::HeaderBlock)
}

fn take_text(block: &mut Bytes) -> Result<String, SpdyError> {
    let length = take_u32(block)? as usize;
    if length > block.len() {
        return Err(SpdyError::HeaderBlock);
    }
    String::from_utf8(block.split_to(length).to_vec()).map_err(|_| SpdyError::HeaderBlock)
}

/// Compresses the header blocks that we send.
pub(super) struct Deflater {
    zlib: Compress,
    dictionary_set: bool,
}

impl Deflater {
    pub(super) fn new() -> Self {
        // A 2 KiB window holds the dictionary and keeps a connection's compressor small.
        Self { zlib: Compress::new_with_window_bits(Compression::fast(), true, 11), dictionary_set: false }
    }

    pub(super) fn encode(&mut self, headers: &Headers) -> Result<Vec<u8>, SpdyError> {
        if !self.dictionary_set {
            self.zlib.set_dictionary(&DICTIONARY).map_err(|_| SpdyError::HeaderCompression)?;
            self.dictionary_set = true;
        }
        let block = serialize(headers);
        if block.len() > MAX_BLOCK {
            return Err(SpdyError::HeaderBlock);
        }
        self.deflate(&block)
    }

    fn deflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, SpdyError> {
        let mut out = Vec::with_capacity(input.len() + 64);
        loop {
            let before = self.zlib.total_in();
            self.zlib.compress_vec(input, &mut out, FlushCompress::Sync).map_err(|_| SpdyError::HeaderCompression)?;
            let consumed = (self.zlib.total_in() - before) as usize;
            input = input.get(consumed..).ok_or(SpdyError::HeaderCompression)?;
            if input.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
            out.reserve(256);
        }
    }
}

fn serialize(headers: &Headers) -> Vec<u8> {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in &headers.0 {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut block = Vec::with_capacity(256);
    block.put_u32(names.len() as u32);
    for name in names {
        let values: Vec<&str> = headers.0.iter().filter(|(n, _)| n == name).map(|(_, v)| v.as_str()).collect();
        let value = values.join("\0");
        for text in [name, &value] {
            block.put_u32(text.len() as u32);
            block.put_slice(text.as_bytes());
        }
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dictionary_is_the_published_one() {
        assert_eq!(DICTIONARY.len(), 1423);
        // The Adler-32 checksum that every SPDY/3 peer writes into its zlib header.
        let (a, b) = DICTIONARY.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65521;
            (a, (b + a) % 65521)
        });
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    #[test]
    fn the_compression_state_spans_blocks() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new());
        let mut sizes = Vec::new();
        for id in 0..50 {
            let id = id.to_string();
            let headers: Headers =
                [("streamType", "data"), ("port", "8080"), ("requestID", id.as_str())].into_iter().collect();
            let block = deflater.encode(&headers).expect("compressible");
            sizes.push(block.len());
            assert_eq!(inflater.decode(&block).expect("decompressible"), headers);
        }
        assert!(sizes[1] < sizes[0], "later blocks refer to earlier ones: {sizes:?}");
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut zlib = Compress::new(Compression::best(), true);
        let mut out = Vec::with_capacity(64 * 1024);
        zlib.compress_vec(&vec![0; 1 << 20], &mut out, FlushCompress::Sync).expect("compressible");
        assert_eq!(Inflater::new().decode(&out), Err(SpdyError::HeaderBlock));
    }

    #[test]
    fn lengths_beyond_the_block_are_refused() {
        for block in [&[0u8, 0, 0, 1][..], &[0, 0, 0, 1, 0, 0, 0, 9, b'a'], &[0xff; 4]] {
            assert_eq!(parse(Bytes::copy_from_slice(block)), Err(SpdyError::HeaderBlock));
        }
    }
}
