//! `GET /logs/…`: the machine's log files, for whoever may read `nodes/log`. Nothing outside the log directory is
//! shown, whatever links point there.

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use http::{Response, StatusCode};
use tokio::io::AsyncReadExt;

use super::body::{self, Body, Sender};

const ROOT: &str = "/var/log";
/// Entries of a directory that are listed.
const MAX_ENTRIES: usize = 10_000;

pub(super) async fn serve(segments: &[&str]) -> Response<Body> {
    let Some(path) = inside(Path::new(ROOT), segments).await else {
        return body::text(StatusCode::NOT_FOUND, "404 page not found\n");
    };
    let answer = match tokio::fs::metadata(&path).await {
        Ok(metadata) if metadata.is_dir() => list(&path).await,
        Ok(metadata) if metadata.is_file() => file(&path).await,
        Ok(_) => return body::text(StatusCode::FORBIDDEN, "403 Forbidden\n"),
        Err(error) => Err(error),
    };
    answer.unwrap_or_else(|error| body::text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
}

/// The real path, if it is below `root`.
async fn inside(root: &Path, segments: &[&str]) -> Option<PathBuf> {
    let decoded = |segment: &&str| {
        let text = percent_encoding::percent_decode_str(segment).decode_utf8().ok()?;
        (!text.contains(['/', '\0']) && text != "..").then(|| text.into_owned())
    };
    let names: Vec<String> = segments.iter().map(decoded).collect::<Option<_>>()?;
    let root = tokio::fs::canonicalize(root).await.ok()?;
    let path = names.iter().filter(|name| !name.is_empty()).fold(root.clone(), |path, name| path.join(name));
    let path = tokio::fs::canonicalize(path).await.ok()?;
    path.starts_with(&root).then_some(path)
}

async fn list(path: &Path) -> std::io::Result<Response<Body>> {
    let mut names = Vec::new();
    let mut entries = tokio::fs::read_dir(path).await?;
    while let Some(entry) = entries.next_entry().await? {
        let suffix = if entry.file_type().await?.is_dir() { "/" } else { "" };
        names.push(format!("{}{suffix}", entry.file_name().to_string_lossy()));
        if names.len() == MAX_ENTRIES {
            break;
        }
    }
    names.sort();
    let escape =
        |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
    let links: String = names.iter().map(|n| format!("<a href=\"{0}\">{0}</a>\n", escape(n))).collect();
    Ok(body::typed(StatusCode::OK, "text/html; charset=utf-8", format!("<pre>\n{links}</pre>\n")))
}

async fn file(path: &Path) -> std::io::Result<Response<Body>> {
    let file = tokio::fs::File::open(path).await?;
    let mut response = Response::new(body::stream(|sender| send(file, sender)));
    let content_type = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, content_type);
    Ok(response)
}

async fn send(mut file: tokio::fs::File, client: Sender) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(32 * 1024);
        match file.read_buf(&mut buffer).await {
            Ok(0) => return,
            Ok(_) => {
                let chunk: Bytes = buffer.split().freeze();
                if client.send(chunk).await.is_err() {
                    return;
                }
            }
            Err(error) => return tracing::warn!(%error, "log file cannot be read to its end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_outside_is_shown() {
        let outside = tempfile::tempdir().expect("a directory");
        std::fs::write(outside.path().join("secret"), "x").expect("written");
        let root = tempfile::tempdir().expect("a directory");
        std::fs::write(root.path().join("a b"), "x").expect("written");
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).expect("linked");
        let cases: [(&[&str], bool); 7] = [
            (&[""], true),
            (&["a%20b"], true),
            (&["link", "secret"], false),
            (&["..", "secret"], false),
            (&["%2e%2e", "secret"], false),
            (&["%2Fetc%2Fpasswd"], false),
            (&["none"], false),
        ];
        for (segments, shown) in cases {
            assert_eq!(inside(root.path(), segments).await.is_some(), shown, "{segments:?}");
        }
    }
}
