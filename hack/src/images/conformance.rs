//! The images that upstream's conformance suite expects, made from upstream's own programs and Debian's parts, because
//! no registry is reachable. Names and tags are those that the suite of the pinned release asks for.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::oci::{self, Entry, Image, Layer};
use super::{busybox_entries, libraries, pause_layer, read};

const E2E: &str = "registry.k8s.io/e2e-test-images";
const KUBERNETES: &str = "k8s.io/kubernetes@v1.37.2";

/// Programs of the host that the test tools call, with the libraries they need.
const TOOLS: [&str; 13] = [
    "/bin/bash",
    "/usr/bin/curl",
    "/usr/bin/dig",
    "/usr/bin/nslookup",
    "/usr/bin/host",
    "/bin/nc.openbsd",
    "/bin/ss",
    "/bin/ip",
    "/usr/bin/iperf",
    "/usr/bin/socat",
    "/usr/bin/ipcs",
    "/usr/bin/nsenter",
    "/usr/bin/getent",
];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbin:x:1:1:bin:/bin:/sbin/nologin\nmail:x:8:12:mail:/var/mail:/sbin/nologin\n\
                      nginx:x:101:101:nginx:/:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n\
                      user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n";
const GROUP: &str = "root:x:0:root\nbin:x:1:\nmail:x:12:\nnginx:x:101:\nuser-defined-in-image:x:1000:\n\
                     group-defined-in-image:x:50000:user-defined-in-image\nnogroup:x:65534:\n";
// A test of image volumes looks for the name of the original's distribution.
const OS_RELEASE: &str =
    "NAME=\"Alpine Linux\"\nID=alpine\nPRETTY_NAME=\"Alpine Linux (stand-in made from Debian parts)\"\n";
const NGINX_CONF: &str = "user nginx; worker_processes 1; error_log /dev/stderr notice; pid /run/nginx.pid;\n\
                          events { worker_connections 256; }\n\
                          http { include mime.types; default_type application/octet-stream; access_log /dev/stdout;\n  \
                          server { listen 80; location / { root /usr/share/nginx/html; index index.html; } } }\n";
const NGINX_PAGE: &str = "<!DOCTYPE html><html><head><title>Welcome to nginx!</title></head><body><h1>Welcome to nginx!</h1></body></html>\n";

/// Builds all of them from the programs in `programs` into the archive `output`.
pub fn build(programs: &Path, output: &Path) -> Result<()> {
    let scratch = tempfile::tempdir().context("cannot create a scratch directory")?;
    let source = module_dir()?;
    let busybox = skeleton(&programs.join("busybox"))?;
    let tools = tools(&programs.join("busybox"))?;
    let agnhost = agnhost(programs, &source)?;
    let nginx = nginx(scratch.path())?;
    let no_new_privs = no_new_privs(scratch.path())?;
    let shell = |name: &str, layers: Vec<Layer>, command: Vec<&'static str>, user: &'static str| Owned {
        reference: format!("{E2E}/{name}"),
        layers,
        entrypoint: vec![],
        command,
        user,
    };
    let mut all = vec![
        Owned {
            reference: "registry.k8s.io/pause:3.10.2".into(),
            layers: vec![pause_layer(scratch.path())?],
            entrypoint: vec!["/pause"],
            command: vec![],
            user: "65535:65535",
        },
        shell("busybox:1.37.0-2", vec![busybox.clone()], vec!["sh"], ""),
        shell("nonroot:1.5", vec![busybox.clone()], vec!["sh"], "1234"),
        shell("nonewprivs:1.4", vec![busybox.clone(), no_new_privs], vec!["nnp"], ""),
        shell("ipc-utils:1.4", vec![busybox.clone()], vec!["sh"], ""),
        shell("glibc-dns-testing:2.1.1", vec![tools.clone()], vec!["sh"], ""),
        shell("nginx:1.27.0-2", vec![busybox.clone(), nginx.clone()], vec!["nginx", "-g", "daemon off;"], ""),
        shell("nginx:1.28.0-2", vec![busybox.clone(), nginx], vec!["nginx", "-g", "daemon off;"], ""),
    ];
    for version in ["2.66.1", "2.55"] {
        // The tags must not have one digest: a file tells them apart.
        let mark = Layer::new(vec![Entry::file("etc/agnhost-tag", version.into(), 0o644)]);
        all.push(Owned {
            reference: format!("{E2E}/agnhost:{version}"),
            layers: vec![tools.clone(), agnhost.clone(), mark],
            entrypoint: vec!["/agnhost"],
            command: vec!["pause"],
            user: "",
        });
    }
    for name in ["kitten", "nautilus"] {
        all.push(Owned {
            reference: format!("{E2E}/{name}:1.8"),
            layers: vec![
                tools.clone(),
                agnhost.clone(),
                directory(&source.join("test/images").join(name).join("html"), "")?,
            ],
            entrypoint: vec!["/agnhost"],
            command: vec!["test-webserver"],
            user: "",
        });
    }
    all.push(program(
        programs,
        &busybox,
        &format!("{E2E}/sample-apiserver:1.29.2"),
        "sample-apiserver",
        "",
        vec!["/sample-apiserver"],
        vec![],
    )?);
    all.push(program(
        programs,
        &busybox,
        "registry.k8s.io/etcd:3.7.0-0",
        "etcd",
        "usr/local/bin/",
        vec![],
        vec!["etcd"],
    )?);
    let images: Vec<Image<'_>> = all.iter().map(Owned::borrow).collect();
    oci::write_archive(output, &images)
}

/// An image whose name was put together here.
struct Owned {
    reference: String,
    layers: Vec<Layer>,
    entrypoint: Vec<&'static str>,
    command: Vec<&'static str>,
    user: &'static str,
}

impl Owned {
    fn borrow(&self) -> Image<'_> {
        Image {
            reference: &self.reference,
            layers: self.layers.clone(),
            entrypoint: self.entrypoint.clone(),
            command: self.command.clone(),
            user: self.user,
        }
    }
}

fn module_dir() -> Result<PathBuf> {
    let output = Command::new("go").args(["env", "GOMODCACHE"]).output().context("cannot run go")?;
    let cache = String::from_utf8(output.stdout).context("go env printed no text")?;
    let dir = Path::new(cache.trim()).join(KUBERNETES);
    if !dir.is_dir() {
        bail!("{} is missing: hack/upstream/build downloads it", dir.display());
    }
    Ok(dir)
}

fn base_entries() -> Vec<Entry> {
    let mut entries: Vec<Entry> = [
        "bin",
        "sbin",
        "usr",
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/local",
        "usr/local/bin",
        "lib64",
        "etc",
        "home",
        "var",
        "var/run",
        "dev",
        "proc",
        "sys",
        "mnt",
        "run",
    ]
    .iter()
    .map(|path| Entry::dir(path, 0o755))
    .collect();
    entries.extend([
        Entry::dir("root", 0o700),
        Entry::dir("tmp", 0o1777),
        Entry::dir("var/tmp", 0o1777),
        Entry::link("lib", "usr/lib"),
    ]);
    for (path, text) in [
        ("etc/passwd", PASSWD),
        ("etc/group", GROUP),
        ("etc/nsswitch.conf", "hosts: files dns\n"),
        ("etc/os-release", OS_RELEASE),
    ] {
        entries.push(Entry::file(path, text.into(), 0o644));
    }
    entries
}

fn skeleton(busybox: &Path) -> Result<Layer> {
    let mut entries = base_entries();
    entries.extend(busybox_entries(busybox, &[])?);
    Ok(Layer::new(entries))
}

/// Real tools where the tests need more than busybox's.
fn tools(busybox: &Path) -> Result<Layer> {
    let mut entries = base_entries();
    entries.extend(busybox_entries(busybox, &["nc", "sh", "ip", "nslookup", "bash", "nsenter"])?);
    let mut seen = BTreeSet::new();
    for program in TOOLS {
        let name = if program.ends_with("nc.openbsd") { "nc" } else { program.rsplit('/').next().unwrap_or(program) };
        let bytes = read(&fs::canonicalize(program).with_context(|| format!("{program} is missing"))?)?;
        if name == "iperf" {
            entries.push(Entry::file("usr/local/bin/iperf", bytes.clone(), 0o755));
        }
        entries.push(Entry::file(&format!("usr/bin/{name}"), bytes, 0o755));
        add_libraries(Path::new(program), &mut seen, &mut entries)?;
    }
    entries.extend([Entry::link("bin/sh", "../usr/bin/bash"), Entry::link("bin/bash", "../usr/bin/bash")]);
    Ok(Layer::new(entries))
}

fn add_libraries(program: &Path, seen: &mut BTreeSet<String>, entries: &mut Vec<Entry>) -> Result<()> {
    for library in libraries(program)? {
        // /lib is a link to /usr/lib in these images: a file may not be written through it.
        let path =
            library.strip_prefix("/lib/").map_or_else(|| library[1..].to_owned(), |rest| format!("usr/lib/{rest}"));
        if seen.insert(path.clone()) {
            entries.push(Entry::file(&path, read(Path::new(&library))?, 0o755));
        }
    }
    Ok(())
}

fn agnhost(programs: &Path, source: &Path) -> Result<Layer> {
    let binary = programs.join("agnhost");
    let mut entries = vec![
        Entry::dir("uploads", 0o755),
        Entry::file("agnhost", read(&binary)?, 0o755),
        Entry::link("agnhost-2", "agnhost"),
    ];
    for file in ["localhost.crt", "localhost.key"] {
        entries.push(Entry::file(file, read(&source.join("test/images/agnhost/porter").join(file))?, 0o644));
    }
    entries.extend(fake_registry()?);
    let mut seen = BTreeSet::new();
    add_libraries(&binary, &mut seen, &mut entries)?;
    Ok(Layer::new(entries))
}

/// The content that agnhost's fake registry serves: a pause image under `testing`.
fn fake_registry() -> Result<Vec<Entry>> {
    let scratch = tempfile::tempdir().context("cannot create a scratch directory")?;
    let image = Image {
        reference: "pause:testing",
        layers: vec![pause_layer(scratch.path())?],
        entrypoint: vec!["/pause"],
        command: vec![],
        user: "65535:65535",
    };
    let content = oci::blobs(&image)?;
    let root = "var/registry/pause";
    let file = |kind: &str, digest: &str, bytes: Vec<u8>| {
        let hash = digest.trim_start_matches("sha256:");
        Entry::file(&format!("{root}/{kind}/sha256/{}/{hash}/data", &hash[..2]), bytes, 0o644)
    };
    let mut entries: Vec<Entry> =
        content.blobs.into_iter().map(|(digest, bytes)| file("blobs", &digest, bytes)).collect();
    entries.push(file("manifests", &content.manifest.0, content.manifest.1));
    let index = content.index.1;
    entries.push(Entry::file(
        &format!("{root}/manifests/testing"),
        format!("{}\n", content.index.0).into_bytes(),
        0o644,
    ));
    entries.push(file("manifests", &content.index.0, index));
    Ok(entries)
}

fn nginx(scratch: &Path) -> Result<Layer> {
    let binary = Path::new("/usr/sbin/nginx");
    let mut entries: Vec<Entry> = [
        "etc/nginx",
        "usr/share/nginx",
        "usr/share/nginx/html",
        "var/lib",
        "var/lib/nginx",
        "var/log",
        "var/log/nginx",
    ]
    .iter()
    .map(|path| Entry::dir(path, 0o755))
    .collect();
    entries.extend([
        Entry::file("usr/sbin/nginx", read(binary).context("nginx is missing (apt-get install nginx-light)")?, 0o755),
        Entry::file("etc/nginx/mime.types", read(Path::new("/etc/nginx/mime.types"))?, 0o644),
        Entry::file("etc/nginx/nginx.conf", NGINX_CONF.into(), 0o644),
        Entry::file("usr/share/nginx/html/index.html", NGINX_PAGE.into(), 0o644),
    ]);
    debug_assert!(scratch.is_dir());
    let mut seen = BTreeSet::new();
    add_libraries(binary, &mut seen, &mut entries)?;
    Ok(Layer::new(entries))
}

/// A set-user-id program that prints its effective uid.
fn no_new_privs(scratch: &Path) -> Result<Layer> {
    let code = "#include <stdio.h>\n#include <unistd.h>\nint main(void) { printf(\"Effective uid: %d\\n\", geteuid()); return 0; }\n";
    let program = super::compile(scratch, "nnp", code)?;
    Ok(Layer::new(vec![Entry::file("usr/local/bin/nnp", program, 0o4755)]))
}

fn program(
    programs: &Path,
    base: &Layer,
    reference: &str,
    name: &str,
    directory: &str,
    entrypoint: Vec<&'static str>,
    command: Vec<&'static str>,
) -> Result<Owned> {
    let layer = Layer::new(vec![Entry::file(&format!("{directory}{name}"), read(&programs.join(name))?, 0o755)]);
    Ok(Owned { reference: reference.to_owned(), layers: vec![base.clone(), layer], entrypoint, command, user: "" })
}

/// The files of a flat directory.
fn directory(dir: &Path, target: &str) -> Result<Layer> {
    let mut entries = Vec::new();
    for file in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?.flatten() {
        let name = file.file_name().to_string_lossy().into_owned();
        entries.push(Entry::file(&format!("{target}{name}"), read(&file.path())?, 0o644));
    }
    entries.sort_by(|a, b| a.path().cmp(b.path()));
    Ok(Layer::new(entries))
}
