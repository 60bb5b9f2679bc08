//! Registries that lie, images that attack, disks that are full: refused with a name, and nothing is left.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tonic::Code;

use crate::harness::liar::{About, Liar, Lie};
use crate::harness::*;

tests![
    the_liar_can_tell_the_truth,
    lies_about_the_manifest,
    lies_about_the_config,
    lies_about_a_layer,
    a_manifest_of_another_digest,
    layers_that_climb_out,
    content_of_another_diff_id,
    a_full_disk,
    a_pull_that_was_cut_off_is_not_believed,
];

async fn pull(daemon: &Daemon, name: &str) -> Result<String, tonic::Status> {
    let image = Some(cri::ImageSpec {
        image: name.into(),
        ..Default::default()
    });
    let request = cri::PullImageRequest {
        image,
        ..Default::default()
    };
    Ok(daemon
        .images()
        .pull_image(request)
        .await?
        .into_inner()
        .image_ref)
}

/// Every file and directory below, but for the metadata store's own.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = stage::tree(dir)
        .into_iter()
        .flat_map(|d| std::fs::read_dir(d).into_iter().flatten().flatten())
        .map(|e| e.path())
        .collect();
    all.sort();
    all
}

/// A daemon that trusts this registry, and gives up soon.
async fn trusting(env: &Env, address: &str) -> Result<Daemon> {
    let daemon = env
        .daemon_with(|s| {
            s.set(
                "images.insecure_registries",
                &format!("[\"{address}\", \"{REGISTRY}\"]"),
            );
            s.set("images.pull_progress_timeout", "\"1s\"");
            s.set("images.request_timeout", "\"3s\"");
            s.set("images.retries", "1");
        })
        .await?;
    Ok(daemon)
}

/// A pull must fail with one of these codes, name the place, and leave the store as it was.
async fn refuses(daemon: &Daemon, name: &str, codes: &[Code], words: &[&str]) -> Result<()> {
    let state = daemon.env().root.join("state");
    let before = files(&state);
    let began = Instant::now();
    let status = tokio::time::timeout(seconds(40), pull(daemon, name))
        .await
        .context("the pull does not end")?;
    let status = status.expect_err(name);
    assert!(codes.contains(&status.code()), "{name}: {status:?}");
    for word in words {
        assert!(
            status.message().contains(word),
            "{name}: {word:?} is not in {:?}",
            status.message()
        );
    }
    assert!(
        began.elapsed() < seconds(30),
        "{name}: {:?}",
        began.elapsed()
    );
    let images = daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images;
    assert_eq!(images, []);
    eventually("nothing left of the pull", seconds(5), || async {
        Ok((files(&state) == before).then_some(()))
    })
    .await
    .with_context(|| {
        let left: Vec<_> = files(&state)
            .into_iter()
            .filter(|f| !before.contains(f))
            .collect();
        format!("{name}: left behind: {left:?}")
    })?;
    Ok(())
}

async fn the_liar_can_tell_the_truth(env: Env) -> Result<()> {
    // Or else every other test here would pass for the wrong reason.
    let liar = Liar::start(About::Manifest, Lie::None).await?;
    let daemon = trusting(&env, &liar.address).await?;
    pull(&daemon, &liar.reference()).await?;
    pull(&daemon, &format!("{}/lies@{}", liar.address, liar.digest)).await?;
    Ok(())
}

const SUSPECT: &[Code] = &[
    Code::DataLoss,
    Code::Unavailable,
    Code::InvalidArgument,
    Code::FailedPrecondition,
    Code::Internal,
    Code::ResourceExhausted,
    Code::DeadlineExceeded,
];

async fn lies(env: &Env, about: About, lies: &[Lie]) -> Result<()> {
    let first = Liar::start(about, Lie::None).await?;
    drop(first);
    for lie in lies {
        let liar = Liar::start(about, *lie).await?;
        // A daemon for each, as the registry's port is in its configuration.
        let daemon = env
            .daemon_with(|s| {
                s.set(
                    "images.insecure_registries",
                    &format!("[\"{}\"]", liar.address),
                );
                s.set("images.pull_progress_timeout", "\"1s\"");
                s.set("images.request_timeout", "\"3s\"");
            })
            .await?;
        refuses(&daemon, &liar.reference(), SUSPECT, &[])
            .await
            .with_context(|| format!("{lie:?}"))?;
        let asked: u32 = liar.asked.lock().unwrap().values().sum();
        assert!(
            asked > 0 && asked < 40,
            "{lie:?}: the registry was asked {asked} times"
        );
        daemon.end().await?;
    }
    Ok(())
}

async fn lies_about_the_manifest(env: Env) -> Result<()> {
    lies(
        &env,
        About::Manifest,
        &[
            Lie::Html,
            Lie::Cut,
            Lie::Short,
            Lie::Endless,
            Lie::Error,
            Lie::Stall,
        ],
    )
    .await
}

async fn lies_about_the_config(env: Env) -> Result<()> {
    lies(
        &env,
        About::Config,
        &[
            Lie::Wrong,
            Lie::Cut,
            Lie::Short,
            Lie::Endless,
            Lie::Html,
            Lie::Error,
            Lie::Stall,
        ],
    )
    .await
}

async fn lies_about_a_layer(env: Env) -> Result<()> {
    lies(
        &env,
        About::Layer,
        &[
            Lie::Wrong,
            Lie::Cut,
            Lie::Short,
            Lie::Endless,
            Lie::Html,
            Lie::Error,
            Lie::Stall,
        ],
    )
    .await
}

async fn a_manifest_of_another_digest(env: Env) -> Result<()> {
    let liar = Liar::start(About::Manifest, Lie::Wrong).await?;
    let daemon = trusting(&env, &liar.address).await?;
    let name = format!("{}/lies@{}", liar.address, liar.digest);
    refuses(&daemon, &name, &[Code::DataLoss], &[&liar.digest]).await
}

async fn layers_that_climb_out(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for name in ["bad-dotdot", "bad-absolute", "bad-symlink", "bad-hardlink"] {
        refuses(
            &daemon,
            &image(name),
            &[Code::InvalidArgument, Code::DataLoss],
            &["climbed-out"],
        )
        .await?;
        let outside = output(
            "find",
            &[&env.root.display().to_string(), "-name", "climbed-out"],
        )
        .await?;
        assert_eq!(outside, "");
        assert!(!Path::new("/climbed-out").exists());
    }
    Ok(())
}

async fn content_of_another_diff_id(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    refuses(
        &daemon,
        &image("bad-diff-id"),
        &[Code::DataLoss],
        &[&"0".repeat(64)],
    )
    .await
}

async fn a_full_disk(env: Env) -> Result<()> {
    let small = Tmpfs::sized(
        env.root.join("state"),
        nix::mount::MsFlags::MS_PRIVATE,
        "24m",
    )?;
    let daemon = env.bare_daemon().await?;
    // Asked of the file system: a walk would trip over what is being removed meanwhile.
    let kilobytes = || -> Result<u64> {
        let now = rustix::fs::statvfs(&small.0)?;
        Ok((now.f_blocks - now.f_bfree) * now.f_frsize / 1024)
    };
    let before = kilobytes()?;
    let status = pull(&daemon, &image("big"))
        .await
        .expect_err("48 MiB on a disk of 24");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(
        status.message().contains("space") || status.message().contains("full"),
        "{status}"
    );
    // The space is free again, and the store works.
    eventually("nothing left of the pull", seconds(5), || async {
        let left = kilobytes()?;
        Ok((left < before + 3000).then_some(()))
    })
    .await
    .with_context(|| format!("before: {before} kB; {:?}", files(&small.0)))?;
    daemon.pull("scratch").await?;
    let images = daemon
        .images()
        .list_images(cri::ListImagesRequest::default())
        .await?
        .into_inner()
        .images;
    assert_eq!(images.len(), 1);
    daemon.end().await
}

async fn a_pull_that_was_cut_off_is_not_believed(env: Env) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    for patience in [30, 100, 200, 400] {
        let slow = tokio::spawn({
            let daemon = daemon.clone();
            async move { daemon.pull("big").await.map(drop) }
        });
        tokio::time::sleep(Duration::from_millis(patience)).await;
        daemon.kill(nix::sys::signal::Signal::SIGKILL).await?;
        slow.await?.ok();
        daemon.launch().await?;
        let images = daemon
            .images()
            .list_images(cri::ListImagesRequest::default())
            .await?
            .into_inner()
            .images;
        if let Some(image) = images.first() {
            // It was that fast; then it must be whole, which the end of this test shows.
            assert!(image.size > 40 << 20, "{image:?}");
        }
    }
    daemon.pull("big").await?;
    let pod = daemon.pod(|_| {}).await?;
    let text = pod
        .output(&["sh", "-c", "cat /big/* | wc -c"], |c| {
            c.image.as_mut().unwrap().image = image("big")
        })
        .await?;
    assert_eq!(text.trim_end(), (48 << 20).to_string());
    Ok(())
}
