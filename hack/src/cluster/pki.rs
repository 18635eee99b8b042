//! The cluster's keys and certificates, made once and kept in `pki/`. Names and groups are those that upstream's
//! bootstrap policy expects (`system:node:<name>` in `system:nodes`, `system:kube-scheduler`, …).

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

use super::kubeconfig;
use super::plan::{API_SERVICE_IP, CLUSTER_DOMAIN, Plan};

const VALID_DAYS: i64 = 3650;

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Who a certificate is for.
struct Subject<'a> {
    common_name: &'a str,
    organization: Option<&'a str>,
    server: bool,
    client: bool,
    names: Vec<SanType>,
}

/// Makes what is missing.
pub fn create(plan: &Plan) -> Result<()> {
    let dir = plan.data_dir.join("pki");
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    if plan.kubeconfig().exists() {
        return Ok(());
    }
    let ca = authority(&dir, "ca", &format!("{}-ca", plan.name))?;
    let front_proxy = authority(&dir, "front-proxy-ca", &format!("{}-front-proxy-ca", plan.name))?;
    service_account_key(&dir)?;

    fn client<'a>(common_name: &'a str, organization: Option<&'a str>) -> Subject<'a> {
        Subject { common_name, organization, server: false, client: true, names: vec![] }
    }
    issue(
        &dir,
        "apiserver",
        &ca,
        &Subject {
            common_name: "kube-apiserver",
            organization: None,
            server: true,
            client: false,
            names: api_names(plan)?,
        },
    )?;
    issue(&dir, "apiserver-kubelet-client", &ca, &client("kube-apiserver-kubelet-client", Some("system:masters")))?;
    issue(&dir, "front-proxy-client", &front_proxy, &client("front-proxy-client", None))?;

    let url = plan.api_url();
    for (name, common_name, organization) in [
        ("controller-manager", "system:kube-controller-manager", None),
        ("scheduler", "system:kube-scheduler", None),
        ("kube-proxy", "system:kube-proxy", None),
    ] {
        issue(&dir, name, &ca, &client(common_name, organization))?;
        kubeconfig::write(&plan.pki(&format!("{name}.conf")), &url, &dir, name)?;
    }
    for node in plan.nodes() {
        let user = format!("system:node:{}", node.name);
        let name = format!("kubelet-{}", node.name);
        issue(&dir, &name, &ca, &client(&user, Some("system:nodes")))?;
        kubeconfig::write(&plan.pki(&format!("{name}.conf")), &url, &dir, &name)?;
        let names = vec![dns(&node.name)?, SanType::IpAddress(IpAddr::V4(node.ip))];
        let serving =
            Subject { common_name: &user, organization: Some("system:nodes"), server: true, client: false, names };
        issue(&dir, &format!("kubelet-{}-serving", node.name), &ca, &serving)?;
    }
    issue(&dir, "admin", &ca, &client("kubernetes-admin", Some("system:masters")))?;
    kubeconfig::write(&plan.pki("admin.conf"), &url, &dir, "admin")?;
    // The last file to be written: its presence says that all of the above is complete.
    kubeconfig::write(&plan.kubeconfig(), &format!("https://127.0.0.1:{}", plan.api_port), &dir, "admin")
}

/// The keys of an API server that listens on loopback, for clients that bring tokens.
pub fn create_for_loopback(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let ca = authority(dir, "ca", "ketch-bench-ca")?;
    service_account_key(dir)?;
    let names = vec![dns("localhost")?, SanType::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST))];
    let server = Subject { common_name: "kube-apiserver", organization: None, server: true, client: false, names };
    issue(dir, "apiserver", &ca, &server)
}

fn api_names(plan: &Plan) -> Result<Vec<SanType>> {
    let mut names = Vec::new();
    for name in ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", super::plan::MASTER] {
        names.push(dns(name)?);
    }
    names.push(dns(&format!("kubernetes.default.svc.{CLUSTER_DOMAIN}"))?);
    for ip in [Ipv4Addr::LOCALHOST, plan.master_ip(), API_SERVICE_IP] {
        names.push(SanType::IpAddress(IpAddr::V4(ip)));
    }
    Ok(names)
}

fn dns(name: &str) -> Result<SanType> {
    Ok(SanType::DnsName(name.try_into().with_context(|| format!("{name:?} is no DNS name"))?))
}

fn authority(dir: &Path, name: &str, common_name: &str) -> Result<Authority> {
    let key = KeyPair::generate().context("cannot generate a key")?;
    let mut params = params(common_name, None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let certificate = params.self_signed(&key).with_context(|| format!("cannot sign {name}"))?;
    write_private(&dir.join(format!("{name}.key")), &key.serialize_pem())?;
    write(&dir.join(format!("{name}.crt")), &certificate.pem())?;
    Ok(Authority { issuer: Issuer::new(params, key), pem: certificate.pem() })
}

fn issue(dir: &Path, name: &str, ca: &Authority, subject: &Subject<'_>) -> Result<()> {
    debug_assert!(!ca.pem.is_empty());
    let key = KeyPair::generate().context("cannot generate a key")?;
    let mut params = params(subject.common_name, subject.organization);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    if subject.server {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    if subject.client {
        params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    }
    params.subject_alt_names = subject.names.clone();
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &ca.issuer).with_context(|| format!("cannot sign {name}"))?;
    write_private(&dir.join(format!("{name}.key")), &key.serialize_pem())?;
    write(&dir.join(format!("{name}.crt")), &certificate.pem())
}

fn params(common_name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.distinguished_name.push(DnType::CommonName, common_name);
    let now = std::time::SystemTime::now();
    let day = std::time::Duration::from_secs(86_400);
    params.not_before = (now - day).into();
    params.not_after = (now + day * u32::try_from(VALID_DAYS).unwrap_or(u32::MAX)).into();
    params
}

/// The key pair that signs service-account tokens (ES256).
fn service_account_key(dir: &Path) -> Result<()> {
    let key = KeyPair::generate().context("cannot generate the service-account key")?;
    write_private(&dir.join("sa.key"), &key.serialize_pem())?;
    write(&dir.join("sa.pub"), &key.public_key_pem())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn write_private(path: &Path, text: &str) -> Result<()> {
    fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot write {}", path.display()))
}
