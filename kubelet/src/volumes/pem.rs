//! Certificates as text: only the certificates of a text, in one layout, without what stands between them.

use base64::Engine;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{Error, PemObject};

const LINE: usize = 64;

/// The certificates of `text` in their order, as DER.
pub fn certificates(text: &str) -> Result<Vec<Vec<u8>>, Error> {
    CertificateDer::pem_slice_iter(text.as_bytes()).map(|found| found.map(|der| der.to_vec())).collect()
}

/// The certificates one after the other.
pub fn encode<'a>(certificates: impl IntoIterator<Item = &'a Vec<u8>>) -> String {
    let mut text = String::new();
    for der in certificates {
        text.push_str("-----BEGIN CERTIFICATE-----\n");
        let mut rest = base64::engine::general_purpose::STANDARD.encode(der);
        while !rest.is_empty() {
            let tail = rest.split_off(rest.len().min(LINE));
            text.push_str(&rest);
            text.push('\n');
            rest = tail;
        }
        text.push_str("-----END CERTIFICATE-----\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_certificates_are_kept() {
        let (first, second) = (encode(&[vec![1; 100]]), encode(&[vec![2; 3]]));
        assert_eq!(first.lines().map(str::len).max(), Some(LINE));
        let noisy = format!("subject: x\n{first}# the next\n{second}\n");
        assert_eq!(encode(&certificates(&noisy).unwrap()), first + &second);
        assert!(certificates("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n").is_err());
    }
}
