//! Full disks and processes that are killed.

use std::process::{Command, Stdio};

use super::*;

const STORE: &str = "SLIPWAY_TEST_STORE";
const REFERENCE: &str = "SLIPWAY_TEST_REFERENCE";

#[test]
fn a_full_disk_is_said_and_cleaned() {
    if !crate::testing::is_root() {
        return;
    }
    // A mount namespace for this thread and the runtime's threads, which it starts.
    let tester = std::thread::spawn(|| {
        use nix::mount::{MsFlags, mount};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        mount(
            Some("none"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=16m"),
        )
        .unwrap();
        tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap()
            .block_on(full_disk(dir.path()));
        nix::mount::umount2(dir.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
    });
    tester.join().unwrap();
}

async fn full_disk(root: &Path) {
    let registry = FakeRegistry::start().await;
    let small = Tar::default().file("small", b"small").finish();
    let large = Tar::default().file("large", &vec![b'x'; 20 << 20]).finish();
    let too_large = registry.add("full", "t", &TestImage::new(&[small.clone(), large], ""));
    let fits = registry.add("fits", "t", &TestImage::new(&[small], ""));
    let store = open(root, |_| {});
    let error = store.pull(&too_large, None, None).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ResourceExhausted,
        "{}",
        error.chain()
    );
    assert!(error.chain().contains("\"large\""), "{}", error.chain());
    store.idle().await;
    for dir in ["staging", "trash", "layers/sha256", "blobs/sha256"] {
        assert_eq!(fs::read_dir(root.join(dir)).unwrap().count(), 0, "{dir}");
    }
    // There is room again.
    let image = store.pull(&fits, None, None).await.unwrap();
    // Not a byte is left: the store can be opened, and what is in it can be removed.
    let filler = root.join("filler");
    fill(&filler);
    store.idle().await;
    drop(store);
    let store = reopen(root).await;
    assert_eq!(store.list(), [image]);
    store.remove(&fits).await.unwrap();
    store.idle().await;
    drop(store);
    let store = reopen(root).await;
    assert!(store.list().is_empty());
    assert_eq!(fs::read_dir(root.join("layers/sha256")).unwrap().count(), 0);
    // A pull says what is wrong and leaves nothing, and the one after it, when there's room, works.
    fill(&filler);
    let error = store.pull(&fits, None, None).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::ResourceExhausted,
        "{}",
        error.chain()
    );
    store.idle().await;
    for dir in ["staging", "trash", "layers/sha256", "blobs/sha256"] {
        assert_eq!(fs::read_dir(root.join(dir)).unwrap().count(), 0, "{dir}");
    }
    fs::remove_file(&filler).unwrap();
    store.pull(&fits, None, None).await.unwrap();
}

/// Takes all the space that is left.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    for size in [1 << 20, 4096, 1] {
        while file.write_all(&vec![b'x'; size]).is_ok() {}
    }
}

async fn reopen(root: &Path) -> ImageStore {
    for _ in 0..500 {
        match ImageStore::open(config(root)) {
            Ok(store) => return store,
            Err(error) => assert!(error.chain().contains("open"), "{}", error.chain()),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the store stays open");
}

/// Not a test by itself: the process that [`a_killed_process_leaves_whole_images_only`] kills.
#[test]
fn child_that_pulls() {
    let (Ok(root), Ok(reference)) = (std::env::var(STORE), std::env::var(REFERENCE)) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        // The parent's may be about to be closed, by a thread that is on its way out.
        let until = std::time::Instant::now() + Duration::from_secs(20);
        let store = loop {
            match ImageStore::open(config(Path::new(&root))) {
                Ok(store) => break store,
                Err(e) => assert!(std::time::Instant::now() < until, "{}", e.chain()),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        loop {
            // Present through several further pulls, so that a kill meets both states.
            for _ in 0..4 {
                store.pull(&reference, None, None).await.unwrap();
            }
            store.remove(&reference).await.unwrap();
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_leaves_whole_images_only() {
    let registry = FakeRegistry::start().await;
    let image = large_image();
    let name = registry.add("k", "t", &image);
    let mut fixture = Fixture::new();
    let (mut whole, mut absent) = (0, 0);
    for round in 0..16u64 {
        let Fixture { dir, store } = fixture;
        store.idle().await;
        drop(store);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "scenarios::disaster::child_that_pulls"])
            .env(STORE, dir.path())
            .env(REFERENCE, &name)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Past its start, then at a moment that differs from round to round.
        let asked = registry.requests().len();
        while registry.requests().len() == asked {
            assert_eq!(child.try_wait().unwrap(), None, "it ended by itself");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(23 * round)).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let store = open(dir.path(), |_| {});
        fixture = Fixture { dir, store };
        fixture.store.idle().await;
        match fixture.store.resolve(&name) {
            None => {
                absent += 1;
                assert_eq!(fixture.files(), Vec::<PathBuf>::new());
            }
            Some(found) => {
                whole += 1;
                for (index, layer) in found.layers.iter().enumerate() {
                    assert_eq!(
                        fs::read(layer.path.join("d/noise")).unwrap(),
                        noise(1 << 20, index as u64 + 1)
                    );
                }
                // Three layers, a configuration and a manifest.
                assert_eq!(fixture.files().len(), 5);
            }
        }
    }
    println!("killed: {whole} times the image was whole, {absent} times absent");
    fixture.pull(&name).await.unwrap();
    fixture.store.remove(&name).await.unwrap();
    fixture.assert_clean().await;
}
