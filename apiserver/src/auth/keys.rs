//! The keys that sign and check service account tokens, in every PEM form that upstream takes: RSA and ECDSA (P-256,
//! P-384); PKCS#1, PKCS#8, SEC1, SubjectPublicKeyInfo or a certificate. Key ids are upstream's, so tokens of one
//! server check on another.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey};
use rsa::pkcs1::{DecodeRsaPrivateKey, DecodeRsaPublicKey, EncodeRsaPrivateKey};
use rsa::pkcs8::{DecodePrivateKey, EncodePublicKey};
use rsa::{RsaPrivateKey, RsaPublicKey};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::public_key::PublicKey as Parsed;
use x509_parser::x509::SubjectPublicKeyInfo;

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{0} holds no usable RSA or ECDSA key")]
    NoKey(PathBuf),
    #[error("not a usable {label} block: {why}")]
    Unusable { label: String, why: String },
}

/// Checks signatures of one key.
pub struct PublicKey {
    pub id: String,
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    /// As in `/openid/v1/jwks`.
    pub jwk: Value,
}

/// Signs tokens.
pub struct SigningKey {
    pub id: String,
    pub algorithm: Algorithm,
    pub key: EncodingKey,
}

const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
const EC_PUBLIC_KEY: &[u8] = &[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];

/// Every key of a PEM file, as a public key.
pub fn read_public_keys(path: &Path) -> Result<Vec<PublicKey>, KeyError> {
    let mut keys = Vec::new();
    for pem in read_pem(path)? {
        let spki = match pem.label.as_str() {
            "EC PARAMETERS" => continue,
            "PUBLIC KEY" => pem.contents,
            "RSA PUBLIC KEY" => rsa_spki(&RsaPublicKey::from_pkcs1_der(&pem.contents).map_err(unusable(&pem.label))?)?,
            "CERTIFICATE" => {
                let (_, certificate) = X509Certificate::from_der(&pem.contents).map_err(unusable(&pem.label))?;
                certificate.public_key().raw.to_vec()
            }
            _ => private_key(&pem)?.1,
        };
        keys.push(PublicKey::from_spki(&spki)?);
    }
    if keys.is_empty() { Err(KeyError::NoKey(path.to_owned())) } else { Ok(keys) }
}

/// The first private key of a PEM file, and its public half.
pub fn read_signing_key(path: &Path) -> Result<(SigningKey, PublicKey), KeyError> {
    for pem in read_pem(path)? {
        if pem.label.ends_with("PRIVATE KEY") {
            let (key, spki) = private_key(&pem)?;
            let public = PublicKey::from_spki(&spki)?;
            return Ok((SigningKey { id: public.id.clone(), algorithm: public.algorithm, key }, public));
        }
    }
    Err(KeyError::NoKey(path.to_owned()))
}

fn read_pem(path: &Path) -> Result<Vec<Pem>, KeyError> {
    let bytes = std::fs::read(path).map_err(|source| KeyError::Read { path: path.to_owned(), source })?;
    Ok(Pem::iter_from_buffer(&bytes).filter_map(Result::ok).collect())
}

fn unusable<E: std::fmt::Display>(label: &str) -> impl FnOnce(E) -> KeyError + '_ {
    move |error| KeyError::Unusable { label: label.to_owned(), why: error.to_string() }
}

fn rsa_spki(key: &RsaPublicKey) -> Result<Vec<u8>, KeyError> {
    Ok(key.to_public_key_der().map_err(unusable("RSA"))?.as_bytes().to_vec())
}

/// A private key ready to sign, and its SubjectPublicKeyInfo.
fn private_key(pem: &Pem) -> Result<(EncodingKey, Vec<u8>), KeyError> {
    let der = pem.contents.as_slice();
    match pem.label.as_str() {
        "RSA PRIVATE KEY" => rsa_pair(&RsaPrivateKey::from_pkcs1_der(der).map_err(unusable(&pem.label))?),
        "PRIVATE KEY" if contains(der, EC_PUBLIC_KEY) => ec_pair(der),
        "PRIVATE KEY" => rsa_pair(&RsaPrivateKey::from_pkcs8_der(der).map_err(unusable(&pem.label))?),
        "EC PRIVATE KEY" => ec_pair(&sec1_to_pkcs8(der)?),
        label => Err(unusable(label)("unknown kind of key")),
    }
}

fn rsa_pair(key: &RsaPrivateKey) -> Result<(EncodingKey, Vec<u8>), KeyError> {
    let der = key.to_pkcs1_der().map_err(unusable("RSA"))?;
    Ok((EncodingKey::from_rsa_der(der.as_bytes()), rsa_spki(&key.to_public_key())?))
}

fn ec_pair(pkcs8: &[u8]) -> Result<(EncodingKey, Vec<u8>), KeyError> {
    let (curve, algorithm) = if contains(pkcs8, P256) {
        (P256, Algorithm::ES256)
    } else if contains(pkcs8, P384) {
        (P384, Algorithm::ES384)
    } else {
        return Err(unusable("EC")("curves other than P-256 and P-384 are not supported"));
    };
    let key = EncodingKey::from_ec_der(pkcs8);
    let jwk = Jwk::from_encoding_key(&key, algorithm).map_err(unusable("EC"))?;
    let AlgorithmParameters::EllipticCurve(point) = jwk.algorithm else { return Err(unusable("EC")("no curve point")) };
    let mut bits = vec![0, 4];
    for coordinate in [point.x, point.y] {
        bits.extend(URL_SAFE_NO_PAD.decode(coordinate).map_err(unusable("EC"))?);
    }
    let algorithm = tlv(0x30, &[EC_PUBLIC_KEY, curve].concat());
    Ok((key, tlv(0x30, &[algorithm, tlv(0x03, &bits)].concat())))
}

/// PKCS#8 around a SEC1 key: version 0, the algorithm with its curve, and the key as an octet string.
fn sec1_to_pkcs8(der: &[u8]) -> Result<Vec<u8>, KeyError> {
    let curve = [P256, P384].into_iter().find(|curve| contains(der, curve));
    let curve =
        curve.ok_or_else(|| unusable("EC PRIVATE KEY")("curves other than P-256 and P-384 are not supported"))?;
    let algorithm = tlv(0x30, &[EC_PUBLIC_KEY, curve].concat());
    Ok(tlv(0x30, &[tlv(0x02, &[0]), algorithm, tlv(0x04, der)].concat()))
}

/// One DER element.
fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let significant = &length[length.iter().position(|b| *b != 0).unwrap_or(length.len() - 1)..];
    let mut out = vec![tag];
    if content.len() >= 0x80 {
        out.push(0x80 | significant.len() as u8);
    }
    out.extend_from_slice(significant);
    out.extend_from_slice(content);
    out
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

impl PublicKey {
    fn from_spki(der: &[u8]) -> Result<Self, KeyError> {
        let wrong = || unusable::<&str>("PUBLIC KEY");
        let (_, spki) = SubjectPublicKeyInfo::from_der(der).map_err(unusable("PUBLIC KEY"))?;
        let id = URL_SAFE_NO_PAD.encode(Sha256::digest(der));
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let (algorithm, key, mut jwk) = match spki.parsed().map_err(unusable("PUBLIC KEY"))? {
            Parsed::RSA(rsa) => {
                let n = trim(rsa.modulus);
                let e = trim(rsa.exponent);
                let jwk = json!({"kty": "RSA", "n": encode(n), "e": encode(e)});
                (Algorithm::RS256, DecodingKey::from_rsa_raw_components(n, e), jwk)
            }
            Parsed::EC(point) => {
                let (algorithm, curve) = match point.data().len() {
                    65 => (Algorithm::ES256, "P-256"),
                    97 => (Algorithm::ES384, "P-384"),
                    _ => return Err(wrong()("curves other than P-256 and P-384 are not supported")),
                };
                let (x, y) = point.data()[1..].split_at((point.data().len() - 1) / 2);
                let jwk = json!({"kty": "EC", "crv": curve, "x": encode(x), "y": encode(y)});
                (algorithm, DecodingKey::from_ec_der(point.data()), jwk)
            }
            _ => return Err(wrong()("neither RSA nor ECDSA")),
        };
        jwk["use"] = "sig".into();
        jwk["kid"] = id.clone().into();
        jwk["alg"] = format!("{algorithm:?}").into();
        Ok(Self { id, algorithm, key, jwk })
    }
}

fn trim(number: &[u8]) -> &[u8] {
    &number[number.iter().position(|byte| *byte != 0).unwrap_or(number.len())..]
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{Header, Validation, decode, encode};

    use super::*;

    fn round_trip(pem: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        std::fs::write(&path, pem).unwrap();
        let (signing, _) = read_signing_key(&path).unwrap();
        let public = read_public_keys(&path).unwrap().remove(0);
        assert_eq!(signing.id, public.id);
        let token = encode(&Header::new(signing.algorithm), &json!({"exp": 4_000_000_000_u64}), &signing.key).unwrap();
        decode::<Value>(&token, &public.key, &Validation::new(public.algorithm)).unwrap();
    }

    #[test]
    fn every_kind_of_key_signs_and_checks() {
        use rsa::pkcs1::EncodeRsaPrivateKey;
        use rsa::pkcs8::EncodePrivateKey;
        let rsa = RsaPrivateKey::new(&mut rsa::rand_core::OsRng, 2048).unwrap();
        round_trip(&rsa.to_pkcs1_pem(Default::default()).unwrap());
        round_trip(&rsa.to_pkcs8_pem(Default::default()).unwrap());
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            round_trip(&key.serialize_pem());
        }
    }

    #[test]
    fn sec1_keys_as_openssl_writes_them() {
        round_trip(
            "-----BEGIN EC PRIVATE KEY-----\n\
             MHcCAQEEIKlGWwAl4bOZVoTvhsWmnQ1P7e5dzWjtx6hmBgclHd5goAoGCCqGSM49\n\
             AwEHoUQDQgAEV9/d4oP1CKZCxRH8OECBz8RtQidwN9Qps+e85wZOVCw4HDceVwDY\n\
             TYHk4uxb9JHQ/jw/piSgzvPVS7fBsrYq+A==\n\
             -----END EC PRIVATE KEY-----\n",
        );
    }
}
