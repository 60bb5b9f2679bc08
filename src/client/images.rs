//! `slipway pull`, `slipway images` and `slipway rmi`.
use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use slipway_proto::admin;
use slipway_proto::cri::*;
use tonic::Code;

use crate::Global;
use crate::connection::Cri;
use crate::error::{ClientError, report};
use crate::list::lines;
use crate::output::{self, Format};
use crate::quantity::{human_size, parse_duration};
use crate::table::{Table, short_id};

/// Options of `slipway pull`.
#[derive(Debug, clap::Args)]
pub struct PullArgs {
    /// References: [registry/]repository[:tag|@digest]
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// Credentials for the registry, USER:PASSWORD
    #[arg(long, env = "SLIPWAY_REGISTRY_CREDENTIALS", hide_env_values = true)]
    creds: Option<String>,
    /// Credentials as base64 of USER:PASSWORD, as in docker's config.json
    #[arg(long, conflicts_with = "creds")]
    auth: Option<String>,
    /// Deadline of one pull
    #[arg(long, value_parser = parse_duration, default_value = "30m", value_name = "DURATION")]
    pull_timeout: Duration,
    /// Only print the pulled image's reference
    #[arg(long, short = 'q')]
    quiet: bool,
}

/// Options of `slipway images`.
#[derive(Debug, clap::Args)]
pub struct ImagesArgs {
    /// Only this repository, reference or id
    image: Option<String>,
    /// Also show digests
    #[arg(long)]
    digests: bool,
    /// Only ids
    #[arg(long, short = 'q')]
    quiet: bool,
    /// Whole ids in tables
    #[arg(long)]
    no_trunc: bool,
    /// Form of the output
    #[arg(long, short = 'o', value_enum, default_value_t)]
    output: Format,
}

/// Options of `slipway rmi`.
#[derive(Debug, clap::Args)]
pub struct RemoveImageArgs {
    /// References or ids
    #[arg(required_unless_present_any = ["all", "prune"], value_name = "IMAGE")]
    images: Vec<String>,
    /// Remove every image
    #[arg(long, short = 'a', conflicts_with = "prune")]
    all: bool,
    /// Remove the images that no container uses
    #[arg(long)]
    prune: bool,
}

/// An image's specification by its reference.
pub fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
        ..Default::default()
    }
}

/// Whether the runtime has the image; its status if so.
///
/// # Errors
/// What the runtime answers.
pub async fn present(cri: &Cri, image: &str) -> Result<Option<Image>, ClientError> {
    let request = ImageStatusRequest {
        image: Some(spec(image)),
        verbose: false,
    };
    Ok(cri.image_status(request).await?.image)
}

/// Pulls an image and gives the reference it is known by. On a terminal a bar shows how far that is; the CRI
/// tells nothing while a pull lasts, so of other runtimes only the time is shown.
///
/// # Errors
/// What the runtime answers.
pub async fn pull_one(
    cri: &Cri,
    image: &str,
    auth: Option<AuthConfig>,
    sandbox_config: Option<PodSandboxConfig>,
    limit: Duration,
) -> Result<String, ClientError> {
    let bar = spinner(image);
    let cri = cri.with_timeout(limit);
    let own = own_request(image, auth.clone().unwrap_or_default());
    let answer = match cri.pull_with_progress(own, |e| show(&bar, image, e)).await {
        Err(ClientError::Rpc { status, .. }) if status.code() == Code::Unimplemented => {
            let request = PullImageRequest {
                image: Some(spec(image)),
                auth,
                sandbox_config,
            };
            cri.pull_image(request).await.map(|answer| answer.image_ref)
        }
        answer => answer,
    };
    bar.finish_and_clear();
    let reference = answer?;
    if reference.is_empty() {
        return Err(ClientError::Answer {
            call: "PullImage",
            what: "the image's reference",
        });
    }
    Ok(reference)
}

fn own_request(image: &str, auth: AuthConfig) -> admin::PullImageRequest {
    admin::PullImageRequest {
        image: image.to_owned(),
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        server_address: auth.server_address,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
    }
}

/// Makes a bar of the spinner once it is known how much there is to come.
fn show(bar: &ProgressBar, image: &str, event: &admin::PullImageEvent) {
    if event.total == 0 {
        return;
    }
    if bar.length() != Some(event.total) {
        bar.set_length(event.total);
        let form = "{spinner} {msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(form) {
            bar.set_style(style);
        }
    }
    bar.set_position(event.arrived);
    let (finished, layers) = (event.finished, event.layers);
    bar.set_message(format!("pulling {image}, {finished} of {layers} layers"));
}

fn spinner(image: &str) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_message(format!("pulling {image}"));
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn credentials(args: &PullArgs) -> Result<Option<AuthConfig>, ClientError> {
    if let Some(auth) = &args.auth {
        return Ok(Some(AuthConfig {
            auth: auth.clone(),
            ..Default::default()
        }));
    }
    let Some(text) = &args.creds else {
        return Ok(None);
    };
    let (user, password) = text
        .split_once(':')
        .filter(|(user, _)| !user.is_empty())
        .ok_or_else(|| ClientError::Usage("--creds: write USER:PASSWORD".to_owned()))?;
    Ok(Some(AuthConfig {
        username: user.to_owned(),
        password: password.to_owned(),
        ..Default::default()
    }))
}

/// Pulls images one after the other.
///
/// # Errors
/// What the runtime answers for the first that fails.
pub async fn pull(args: &PullArgs, global: &Global) -> Result<(), ClientError> {
    let auth = credentials(args)?;
    let cri = Cri::connect(global).await?;
    for image in &args.images {
        let started = std::time::Instant::now();
        let reference = pull_one(&cri, image, auth.clone(), None, args.pull_timeout).await?;
        if args.quiet {
            output::print(&format!("{reference}\n"))?;
            continue;
        }
        let size = present(&cri, &reference)
            .await?
            .map_or(0, |image| image.size);
        let took = started.elapsed().as_secs_f64();
        let size = human_size(size);
        output::print(&format!(
            "pulled {image}: {reference}, {size} in {took:.1} s\n"
        ))?;
    }
    Ok(())
}

/// Lists images.
///
/// # Errors
/// What the runtime answers.
pub async fn list(args: &ImagesArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut images = cri
        .list_images(ListImagesRequest { filter: None })
        .await?
        .images;
    images.retain(|image| args.image.as_ref().is_none_or(|wanted| fits(image, wanted)));
    images.sort_by(|a, b| (&a.repo_tags, &a.id).cmp(&(&b.repo_tags, &b.id)));
    if args.quiet {
        let id = |image: &Image| {
            if args.no_trunc {
                image.id.clone()
            } else {
                short_id(&image.id)
            }
        };
        return output::print(&lines(images.iter().map(id)));
    }
    match args.output {
        Format::Table => output::print(&table(&images, args).render()),
        format => {
            let value = output::to_value("ListImagesResponse", &ListImagesResponse { images })?;
            output::print(&output::render(&value, format)?)
        }
    }
}

fn fits(image: &Image, wanted: &str) -> bool {
    let id = image
        .id
        .split_once(':')
        .map_or(image.id.as_str(), |(_, hex)| hex);
    id.starts_with(wanted)
        || image.id == wanted
        || image
            .repo_tags
            .iter()
            .chain(&image.repo_digests)
            .any(|reference| {
                let (repository, _) = split_reference(reference);
                // The part behind a slash names the repository for people: busybox, library/busybox.
                let named = |text: &str| text == wanted || text.ends_with(&format!("/{wanted}"));
                named(repository) || named(reference)
            })
}

/// Splits `repository:tag` or `repository@digest`; a registry's port is no tag.
fn split_reference(reference: &str) -> (&str, &str) {
    if let Some(parts) = reference.split_once('@') {
        return parts;
    }
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => (repository, tag),
        _ => (reference, ""),
    }
}

fn table(images: &[Image], args: &ImagesArgs) -> Table {
    let none = "<none>".to_owned();
    let mut table = if args.digests {
        Table::new(&["IMAGE", "TAG", "DIGEST", "IMAGE ID", "SIZE"])
    } else {
        Table::new(&["IMAGE", "TAG", "IMAGE ID", "SIZE"])
    };
    let id = |text: &str| {
        if args.no_trunc {
            text.to_owned()
        } else {
            short_id(text)
        }
    };
    for image in images {
        let digest_reference = image.repo_digests.first().map(|text| split_reference(text));
        let digest = digest_reference.map_or(none.clone(), |(_, digest)| id(digest));
        let mut names: Vec<(String, String)> = image
            .repo_tags
            .iter()
            .map(|text| split_reference(text))
            .map(|(repository, tag)| (repository.to_owned(), tag.to_owned()))
            .collect();
        if names.is_empty() {
            let repository = digest_reference.map_or(none.clone(), |(name, _)| name.to_owned());
            names.push((repository, none.clone()));
        }
        for (repository, tag) in names {
            let mut row = vec![repository, tag];
            if args.digests {
                row.push(digest.clone());
            }
            row.extend([id(&image.id), human_size(image.size)]);
            table.row(row);
        }
    }
    table
}

/// Removes images; goes on after a failure and reports it.
///
/// # Errors
/// [`ClientError::Some`] when one of them could not be removed.
pub async fn remove(args: &RemoveImageArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut images = args.images.clone();
    if args.all || args.prune {
        let used: Vec<String> = if args.prune {
            let containers = crate::lookup::containers(&cri).await?;
            containers
                .into_iter()
                .flat_map(|c| [c.image_id, c.image_ref])
                .collect()
        } else {
            Vec::new()
        };
        let all = cri
            .list_images(ListImagesRequest { filter: None })
            .await?
            .images;
        let unused = |image: &Image| {
            let names = std::iter::once(&image.id).chain(&image.repo_digests);
            !image.pinned && !names.into_iter().any(|name| used.contains(name))
        };
        images.extend(
            all.into_iter()
                .filter(|i| args.all || unused(i))
                .map(|i| i.id),
        );
    }
    let mut failures = 0;
    for image in &images {
        if let Err(error) = remove_one(&cri, image).await {
            eprintln!("slipway: {image}: {}", report(&error));
            failures += 1;
        } else {
            output::print(&format!("removed {image}\n"))?;
        }
    }
    if failures > 0 {
        Err(ClientError::Some(failures, images.len()))
    } else {
        Ok(())
    }
}

async fn remove_one(cri: &Cri, image: &str) -> Result<(), ClientError> {
    // The CRI answers success for an absent image; a person mistyped it.
    if present(cri, image).await?.is_none() {
        return Err(ClientError::NotFound {
            kinds: "image",
            id: image.to_owned(),
        });
    }
    cri.remove_image(RemoveImageRequest {
        image: Some(spec(image)),
    })
    .await
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_split() {
        for (text, parts) in [
            (
                "docker.io/library/busybox:1.36",
                ("docker.io/library/busybox", "1.36"),
            ),
            ("host:5000/a/b", ("host:5000/a/b", "")),
            ("host:5000/a/b:t", ("host:5000/a/b", "t")),
            ("a@sha256:00", ("a", "sha256:00")),
        ] {
            assert_eq!(split_reference(text), parts);
        }
    }

    #[test]
    fn images_are_found_by_what_people_write() {
        let image = Image {
            id: "sha256:0123456789abcdef".into(),
            repo_tags: vec!["docker.io/library/busybox:1.36".into()],
            ..Default::default()
        };
        for wanted in [
            "busybox",
            "library/busybox:1.36",
            "docker.io/library/busybox",
            "0123",
        ] {
            assert!(fits(&image, wanted), "{wanted}");
        }
        for wanted in ["box", "busybox:1.35", "123"] {
            assert!(!fits(&image, wanted), "{wanted}");
        }
    }

    #[test]
    fn a_row_for_each_tag_and_one_for_untagged_images() {
        let args = ImagesArgs {
            image: None,
            digests: false,
            quiet: false,
            no_trunc: false,
            output: Format::Table,
        };
        let images = [
            Image {
                id: "sha256:0123456789abcdef".into(),
                repo_tags: vec!["a:1".into(), "a:2".into()],
                size: 7_670_000,
                ..Default::default()
            },
            Image {
                id: "sha256:1".into(),
                repo_digests: vec!["b@sha256:2".into()],
                ..Default::default()
            },
        ];
        assert_eq!(
            table(&images, &args).render(),
            "IMAGE   TAG      IMAGE ID        SIZE\n\
             a       1        0123456789abc   7.67MB\n\
             a       2        0123456789abc   7.67MB\n\
             b       <none>   1               0B\n"
        );
    }
}
