//! `slipway pods` and `slipway ps`.
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use regex::Regex;
use slipway_proto::cri::*;

use crate::Global;
use crate::connection::Cri;
use crate::error::ClientError;
use crate::lookup;
use crate::output::{self, Format};
use crate::quantity::human_age;
use crate::table::{Table, short_id};

/// Options of `slipway pods`.
#[derive(Debug, clap::Args)]
pub struct PodsArgs {
    /// Only pods whose id begins so
    #[arg(long)]
    id: Option<String>,
    /// Only pods whose name matches this regular expression
    #[arg(long)]
    name: Option<Regex>,
    /// Only pods whose namespace matches this regular expression
    #[arg(long)]
    namespace: Option<Regex>,
    /// Only pods in this state
    #[arg(long, short = 's', value_enum, ignore_case = true)]
    state: Option<PodState>,
    /// Only pods with this label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    shown: Shown,
}

/// Options of `slipway ps`.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// All containers, not only the running ones
    #[arg(long, short = 'a')]
    all: bool,
    /// Only containers whose id begins so
    #[arg(long)]
    id: Option<String>,
    /// Only containers whose name matches this regular expression
    #[arg(long)]
    name: Option<Regex>,
    /// Only containers of this pod (its id or the beginning of it)
    #[arg(long, short = 'p')]
    pod: Option<String>,
    /// Only containers of this image
    #[arg(long)]
    image: Option<String>,
    /// Only containers in this state
    #[arg(long, short = 's', value_enum, ignore_case = true)]
    state: Option<ContainerStateArg>,
    /// Only containers with this label; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    label: Vec<(String, String)>,
    #[command(flatten)]
    shown: Shown,
}

#[derive(Debug, clap::Args)]
struct Shown {
    /// Only the N most recently made
    #[arg(long, short = 'n', value_name = "N")]
    last: Option<usize>,
    /// Only the latest
    #[arg(long, short = 'l', conflicts_with = "last")]
    latest: bool,
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

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum PodState {
    Ready,
    #[value(name = "notready")]
    NotReady,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ContainerStateArg {
    Created,
    Running,
    Exited,
    Unknown,
}

/// Reads `KEY=VALUE`.
///
/// # Errors
/// When there is no `=` or no key.
pub fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write KEY=VALUE".to_owned()),
    }
}

/// How long ago a time in nanoseconds since 1970 was.
pub fn age(created_at: i64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let then = Duration::from_nanos(u64::try_from(created_at).unwrap_or_default());
    human_age(now.saturating_sub(then))
}

impl Shown {
    /// Newest first, as many as wanted.
    fn cut<T>(&self, items: &mut Vec<T>, created_at: impl Fn(&T) -> i64) {
        items.sort_by_key(|item| std::cmp::Reverse(created_at(item)));
        let wanted = if self.latest { Some(1) } else { self.last };
        items.truncate(wanted.unwrap_or(usize::MAX));
    }

    fn id(&self, id: &str) -> String {
        if self.no_trunc {
            id.to_owned()
        } else {
            short_id(id)
        }
    }
}

fn has_labels(labels: &HashMap<String, String>, wanted: &[(String, String)]) -> bool {
    wanted
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

/// Lists pods.
///
/// # Errors
/// What the runtime answers.
pub async fn pods(args: &PodsArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut items = lookup::pods(&cri).await?;
    items.retain(|pod| {
        let meta = pod.metadata.clone().unwrap_or_default();
        args.id.as_ref().is_none_or(|id| pod.id.starts_with(id))
            && args
                .name
                .as_ref()
                .is_none_or(|name| name.is_match(&meta.name))
            && args
                .namespace
                .as_ref()
                .is_none_or(|ns| ns.is_match(&meta.namespace))
            && has_labels(&pod.labels, &args.label)
            && args.state.is_none_or(|state| {
                matches!(state, PodState::Ready) == (pod.state() == PodSandboxState::SandboxReady)
            })
    });
    args.shown.cut(&mut items, |pod| pod.created_at);
    if args.shown.quiet {
        return output::print(&lines(items.iter().map(|pod| args.shown.id(&pod.id))));
    }
    match args.shown.output {
        Format::Table => output::print(&pods_table(&items, &args.shown).render()),
        format => {
            let value =
                output::to_value("ListPodSandboxResponse", &ListPodSandboxResponse { items })?;
            output::print(&output::render(&value, format)?)
        }
    }
}

fn pods_table(items: &[PodSandbox], shown: &Shown) -> Table {
    let mut table = Table::new(&[
        "POD ID",
        "CREATED",
        "STATE",
        "NAME",
        "NAMESPACE",
        "ATTEMPT",
        "RUNTIME",
    ]);
    for pod in items {
        let meta = pod.metadata.clone().unwrap_or_default();
        let ready = pod.state() == PodSandboxState::SandboxReady;
        let handler = pod.runtime_handler.as_str();
        table.row([
            shown.id(&pod.id),
            age(pod.created_at),
            if ready { "Ready" } else { "NotReady" }.to_owned(),
            meta.name,
            meta.namespace,
            meta.attempt.to_string(),
            if handler.is_empty() {
                "(default)"
            } else {
                handler
            }
            .to_owned(),
        ]);
    }
    table
}

/// Each item on a line.
pub fn lines(items: impl Iterator<Item = String>) -> String {
    items.map(|item| item + "\n").collect()
}

/// Lists containers.
///
/// # Errors
/// What the runtime answers.
pub async fn containers(args: &PsArgs, global: &Global) -> Result<(), ClientError> {
    let cri = Cri::connect(global).await?;
    let mut items = lookup::containers(&cri).await?;
    items.retain(|container| keep(args, container));
    args.shown.cut(&mut items, |container| container.created_at);
    if args.shown.quiet {
        return output::print(&lines(items.iter().map(|c| args.shown.id(&c.id))));
    }
    if args.shown.output != Format::Table {
        let response = ListContainersResponse {
            containers: items,
            ..Default::default()
        };
        let value = output::to_value("ListContainersResponse", &response)?;
        return output::print(&output::render(&value, args.shown.output)?);
    }
    let pods: HashMap<String, PodSandboxMetadata> = lookup::pods(&cri)
        .await?
        .into_iter()
        .map(|pod| (pod.id, pod.metadata.unwrap_or_default()))
        .collect();
    name_images(&cri, &mut items).await;
    output::print(&containers_table(&items, &pods, &args.shown).render())
}

fn keep(args: &PsArgs, container: &Container) -> bool {
    let name = container.metadata.as_ref().map_or("", |m| &m.name);
    let state = match args.state {
        Some(ContainerStateArg::Created) => Some(ContainerState::ContainerCreated),
        Some(ContainerStateArg::Running) => Some(ContainerState::ContainerRunning),
        Some(ContainerStateArg::Exited) => Some(ContainerState::ContainerExited),
        Some(ContainerStateArg::Unknown) => Some(ContainerState::ContainerUnknown),
        // As crictl: asking for one or for the last ones means in any state.
        None if args.all || args.id.is_some() || args.shown.last.is_some() || args.shown.latest => {
            None
        }
        None => Some(ContainerState::ContainerRunning),
    };
    args.id
        .as_ref()
        .is_none_or(|id| container.id.starts_with(id))
        && args
            .name
            .as_ref()
            .is_none_or(|wanted| wanted.is_match(name))
        && args
            .pod
            .as_ref()
            .is_none_or(|pod| container.pod_sandbox_id.starts_with(pod))
        && args.image.as_ref().is_none_or(|image| {
            shown_image(container).contains(image.as_str())
                || container.image_id.contains(image.as_str())
                || container.image_ref.contains(image.as_str())
        })
        && has_labels(&container.labels, &args.label)
        && state.is_none_or(|state| container.state() == state)
}

/// Puts the image's first tag where the runtime only tells its id.
async fn name_images(cri: &Cri, items: &mut [Container]) {
    // A table with ids is better than none: not a reason to fail.
    let Ok(response) = cri.list_images(ListImagesRequest { filter: None }).await else {
        return;
    };
    for container in items {
        let id = shown_image(container);
        let image = response.images.iter().find(|image| image.id == id);
        if let (Some(tag), Some(spec)) = (
            image.and_then(|image| image.repo_tags.first()),
            container.image.as_mut(),
        ) {
            spec.user_specified_image.clone_from(tag);
        }
    }
}

fn shown_image(container: &Container) -> &str {
    let spec = container.image.as_ref();
    let name = spec.map_or("", |s| &s.user_specified_image);
    if name.is_empty() {
        spec.map_or("", |s| &s.image)
    } else {
        name
    }
}

fn containers_table(
    items: &[Container],
    pods: &HashMap<String, PodSandboxMetadata>,
    shown: &Shown,
) -> Table {
    let mut table = Table::new(&[
        "CONTAINER ID",
        "IMAGE",
        "CREATED",
        "STATE",
        "NAME",
        "ATTEMPT",
        "POD ID",
        "POD",
        "NAMESPACE",
    ]);
    for container in items {
        let meta = container.metadata.clone().unwrap_or_default();
        let image = shown_image(container);
        let is_id = image.len() >= 64 && !image.contains('/');
        let pod = pods.get(&container.pod_sandbox_id);
        let known = |text: Option<&String>| text.map_or("unknown", String::as_str).to_owned();
        table.row([
            shown.id(&container.id),
            if is_id {
                shown.id(image)
            } else {
                image.to_owned()
            },
            age(container.created_at),
            match container.state() {
                ContainerState::ContainerCreated => "Created",
                ContainerState::ContainerRunning => "Running",
                ContainerState::ContainerExited => "Exited",
                ContainerState::ContainerUnknown => "Unknown",
            }
            .to_owned(),
            meta.name,
            meta.attempt.to_string(),
            shown.id(&container.pod_sandbox_id),
            known(pod.map(|p| &p.name)),
            known(pod.map(|p| &p.namespace)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Ps {
        #[command(flatten)]
        args: PsArgs,
    }

    fn args(text: &[&str]) -> PsArgs {
        Ps::try_parse_from(["ps"].iter().chain(text)).unwrap().args
    }

    fn container(id: &str, name: &str, state: ContainerState) -> Container {
        Container {
            id: id.into(),
            pod_sandbox_id: "p0123456789abcdef".into(),
            metadata: Some(ContainerMetadata {
                name: name.into(),
                attempt: 3,
            }),
            image: Some(ImageSpec {
                image: format!("sha256:{}", "ab".repeat(32)),
                ..Default::default()
            }),
            state: state.into(),
            created_at: 1,
            labels: [("app".to_owned(), "web".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn filters() {
        let running = container("c1", "web", ContainerState::ContainerRunning);
        let exited = container("c2", "job", ContainerState::ContainerExited);
        for (text, expected) in [
            (&[][..], [true, false]),
            (&["-a"], [true, true]),
            (&["--state", "Exited"], [false, true]),
            (&["-a", "--name", "^w.b$"], [true, false]),
            (&["--id", "c2"], [false, true]),
            (&["-a", "--label", "app=web", "--pod", "p01"], [true, true]),
            (&["-a", "--label", "app=other"], [false, false]),
            (&["-a", "--image", "abab"], [true, true]),
            (&["-a", "--pod", "q"], [false, false]),
        ] {
            let args = args(text);
            assert_eq!(
                [keep(&args, &running), keep(&args, &exited)],
                expected,
                "{text:?}"
            );
        }
    }

    #[test]
    fn rows_read_like_crictls() {
        let pods = [(
            "p0123456789abcdef".to_owned(),
            PodSandboxMetadata {
                name: "pod".into(),
                namespace: "ns".into(),
                ..Default::default()
            },
        )]
        .into();
        let item = container("c0123456789abcdef", "web", ContainerState::ContainerRunning);
        let text = containers_table(&[item], &pods, &args(&[]).shown).render();
        let row: Vec<_> = text
            .lines()
            .nth(1)
            .unwrap()
            .split("   ")
            .map(str::trim)
            .collect();
        assert_eq!(row[..2], ["c0123456789ab", "ababababababa"]);
        assert!(row[2].ends_with(" ago"), "{text}");
        let row: Vec<_> = row[3..].iter().filter(|c| !c.is_empty()).copied().collect();
        assert_eq!(row, ["Running", "web", "3", "p0123456789ab", "pod", "ns"]);
    }

    #[test]
    fn the_last_ones() {
        let mut items = vec![1_i64, 5, 3];
        args(&["--last", "2"]).shown.cut(&mut items, |&i| i);
        assert_eq!(items, [5, 3]);
        args(&["-l"]).shown.cut(&mut items, |&i| i);
        assert_eq!(items, [5]);
    }
}
