//! The images that a cluster starts with, built here because no registry is assumed to be reachable: pause (holds a
//! pod's namespaces), demo (a shell and a web server for the tutorial) and cluster-dns.

pub mod oci;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cluster::plan::Plan;
use oci::{Entry, Image, Layer};

pub const PAUSE: &str = "ketch.local/pause:1";
pub const DEMO: &str = "ketch.local/demo:1";
pub const DNS: &str = "ketch.local/cluster-dns:1";

const PAUSE_SOURCE: &str = include_str!("pause.c");

/// The archives that each node of the cluster loads at its start.
pub fn archives(plan: &Plan) -> Vec<PathBuf> {
    let mut all = vec![base_archive(plan)];
    all.extend(plan.images.iter().cloned());
    all
}

fn base_archive(plan: &Plan) -> PathBuf {
    plan.data_dir.join("images").join("base.tar")
}

/// Builds the base archive.
pub fn build(plan: &Plan) -> Result<()> {
    let archive = base_archive(plan);
    let dir = archive.parent().context("the archive has no directory")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let shell = shell_layer()?;
    let images = [
        Image {
            reference: PAUSE,
            layers: vec![pause_layer(dir)?],
            entrypoint: vec!["/pause"],
            command: vec![],
            user: "65535:65535",
        },
        Image {
            reference: DEMO,
            layers: vec![shell, demo_layer()],
            entrypoint: vec![],
            command: vec!["/bin/serve"],
            user: "",
        },
        Image {
            reference: DNS,
            layers: vec![program_layer(plan.bin("cluster-dns"))?],
            entrypoint: vec!["/cluster-dns"],
            command: vec![],
            user: "",
        },
    ];
    oci::write_archive(&archive, &images)
}

fn pause_layer(dir: &Path) -> Result<Layer> {
    let source = dir.join("pause.c");
    let program = dir.join("pause");
    fs::write(&source, PAUSE_SOURCE).context("cannot write pause.c")?;
    let output = Command::new("cc")
        .args(["-Os", "-static", "-s", "-o"])
        .arg(&program)
        .arg(&source)
        .output()
        .context("cannot run cc (apt-get install gcc libc6-dev)")?;
    if !output.status.success() {
        bail!("cannot compile pause: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(Layer::new(vec![Entry::file("pause", fs::read(&program).context("cannot read pause")?, 0o755)]))
}

/// A static busybox with a link for each of its programs.
fn shell_layer() -> Result<Layer> {
    let path = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(Path::new)
        .find(|path| path.exists())
        .context("busybox is missing (apt-get install busybox-static)")?;
    let list = Command::new(path).arg("--list").output().context("cannot run busybox --list")?;
    let mut entries = vec![
        Entry::dir("bin", 0o755),
        Entry::dir("etc", 0o755),
        Entry::dir("root", 0o700),
        Entry::dir("tmp", 0o1777),
        Entry::dir("var", 0o755),
        Entry::dir("usr", 0o755),
        Entry::file("bin/busybox", fs::read(path).context("cannot read busybox")?, 0o755),
        Entry::file(
            "etc/passwd",
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n".to_vec(),
            0o644,
        ),
        Entry::file("etc/group", b"root:x:0:\nnogroup:x:65534:\n".to_vec(), 0o644),
    ];
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
        entries.push(Entry::link(&format!("bin/{applet}"), "busybox"));
    }
    Ok(Layer::new(entries))
}

fn demo_layer() -> Layer {
    let serve = "#!/bin/sh\n# Answers every request with the pod's name, so that one sees which pod answered.\n\
                 mkdir -p /www\nhostname > /www/index.html\nexec httpd -f -p \"${PORT:-8080}\" -h /www\n";
    Layer::new(vec![Entry::dir("www", 0o755), Entry::file("bin/serve", serve.into(), 0o755)])
}

/// A program at the image's root with the shared libraries that it needs.
fn program_layer(program: &Path) -> Result<Layer> {
    let name = program.file_name().and_then(|n| n.to_str()).context("the program has no name")?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut entries =
        vec![Entry::dir("etc", 0o755), Entry::dir("tmp", 0o1777), Entry::file(name, read(program)?, 0o755)];
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let libraries = String::from_utf8_lossy(&output.stdout);
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        entries.push(Entry::file(&library[1..], read(Path::new(library))?, 0o755));
    }
    Ok(Layer::new(entries))
}
