//! CNI plugins that misbehave, and configurations that come and go.

use std::time::Instant;

use tonic::Code;

use crate::harness::*;

tests![
    a_plugin_that_fails,
    a_plugin_that_prints_rubbish,
    a_plugin_that_hangs,
    a_plugin_that_is_missing,
    a_later_plugin_that_fails,
    a_delete_that_fails_is_tried_again,
    what_a_failed_pod_leaves_is_given_back_later,
    an_answer_without_an_address,
    plugins_get_what_the_specification_says,
    no_configuration_then_one,
    a_broken_configuration,
    host_network_needs_no_plugin,
];

/// Writes a plugin that is a shell script; its standard input is the network's configuration.
///
/// By another process, and by renaming: nobody may have the file open for writing when the daemon runs it, nor
/// may it be written to while the daemon does.
fn plugin(env: &Env, name: &str, script: &str) -> Result<()> {
    let path = env.dir("plugins")?.join(name);
    let mut child = std::process::Command::new("sh")
        .args([
            "-c",
            "cat >\"$1.new\" && chmod 755 \"$1.new\" && mv \"$1.new\" \"$1\"",
            "sh",
        ])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("its standard input")?;
    std::io::Write::write_all(&mut input, format!("#!/bin/sh\n{script}\n").as_bytes())?;
    drop(input);
    ensure!(child.wait()?.success(), "writing the plugin {name}");
    Ok(())
}

/// A configuration list with these plugins.
fn conflist(plugins: &[serde_json::Value]) -> String {
    serde_json::json!({"cniVersion": "1.0.0", "name": "fake", "plugins": plugins}).to_string()
}

async fn with_plugins(env: &Env, plugins: &[serde_json::Value]) -> Result<Daemon> {
    let text = conflist(plugins);
    let daemon = env
        .daemon_with(|s| {
            s.cni = Some(text);
            s.set("network.timeout", "\"3s\"");
        })
        .await?;
    Ok(daemon)
}

/// A pod on the network must be refused with these words, and leave nothing; its name is free.
async fn refuses(daemon: &Daemon, names: &[&str]) -> Result<tonic::Status> {
    let mut config = config::pod(daemon);
    config::own_network(&mut config);
    let mut last = None;
    // Twice: a name that were still reserved would change the second answer.
    for _ in 0..2 {
        let status = daemon
            .run_pod(config.clone())
            .await
            .map(|p| p.id)
            .expect_err("a pod without a network");
        assert!(
            matches!(
                status.code(),
                Code::Internal
                    | Code::Unavailable
                    | Code::DeadlineExceeded
                    | Code::FailedPrecondition
            ),
            "{status}"
        );
        for name in names {
            assert!(
                status.message().contains(name),
                "{name:?} is not in {:?}",
                status.message()
            );
        }
        assert_eq!(
            leaks::settle(daemon.env(), leaks::objects).await,
            Vec::<String>::new()
        );
        assert_eq!(daemon.pod_dirs(), Vec::<String>::new());
        last = Some(status);
    }
    let pods = daemon
        .runtime()
        .list_pod_sandbox(cri::ListPodSandboxRequest::default())
        .await?
        .into_inner()
        .items;
    assert_eq!(pods, []);
    last.context("no answer")
}

const OK: &str = r#"{"cniVersion": "1.0.0", "interfaces": [{"name": "eth0", "sandbox": "x"}], "ips": [{"address": "10.9.8.7/24", "interface": 0}]}"#;

async fn a_plugin_that_fails(env: Env) -> Result<()> {
    plugin(
        &env,
        "failing",
        r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo '{"cniVersion": "1.0.0", "code": 100, "msg": "no more addresses", "details": "the pool is empty"}'; exit 1"#,
    )?;
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "failing"})]).await?;
    refuses(
        &daemon,
        &["failing", "no more addresses", "the pool is empty"],
    )
    .await?;
    // One that only says so on standard error.
    plugin(
        &env,
        "failing",
        r#"[ "$CNI_COMMAND" = ADD ] || exit 0; echo "words on standard error" >&2; exit 7"#,
    )?;
    refuses(&daemon, &["failing", "words on standard error"]).await?;
    Ok(())
}

async fn a_plugin_that_prints_rubbish(env: Env) -> Result<()> {
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "rubbish"})]).await?;
    for rubbish in [
        "no JSON at all",
        "{",
        "[]",
        r#"{"cniVersion": "1.0.0", "ips": [{"address": "not an address"}]}"#,
    ] {
        plugin(
            &env,
            "rubbish",
            &format!("[ \"$CNI_COMMAND\" = ADD ] || exit 0; echo '{rubbish}'"),
        )?;
        refuses(&daemon, &["rubbish"]).await?;
    }
    // Without end.
    plugin(
        &env,
        "rubbish",
        "[ \"$CNI_COMMAND\" = ADD ] || exit 0; while :; do echo aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa; done",
    )?;
    refuses(&daemon, &["rubbish"]).await?;
    Ok(())
}

async fn a_plugin_that_hangs(env: Env) -> Result<()> {
    plugin(
        &env,
        "hanging",
        "[ \"$CNI_COMMAND\" = ADD ] || exit 0; echo $$ >\"$(dirname \"$0\")/pid\"; sleep 3333 & sleep 4444",
    )?;
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "hanging"})]).await?;
    let began = Instant::now();
    refuses(&daemon, &["hanging", "3 s"]).await?;
    assert!(began.elapsed() < seconds(20), "{:?}", began.elapsed());
    let pid = read(env.root.join("plugins/pid"))?;
    assert!(
        !std::path::Path::new(&format!("/proc/{pid}")).exists(),
        "the plugin still runs"
    );
    // Nor do its children.
    let all = output("ps", &["-eo", "args"]).await?;
    assert!(
        !all.contains("sleep 3333") && !all.contains("sleep 4444"),
        "{all}"
    );
    Ok(())
}

async fn a_plugin_that_is_missing(env: Env) -> Result<()> {
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "not-installed"})]).await?;
    refuses(&daemon, &["not-installed"]).await?;
    Ok(())
}

async fn a_later_plugin_that_fails(env: Env) -> Result<()> {
    let log = env.root.join("calls");
    let note = format!(
        "echo \"$(basename \"$0\") $CNI_COMMAND\" >>'{}'",
        log.display()
    );
    plugin(
        &env,
        "first",
        &format!("{note}; [ \"$CNI_COMMAND\" = ADD ] && echo '{OK}'; exit 0"),
    )?;
    plugin(
        &env,
        "second",
        &format!(
            "{note}; [ \"$CNI_COMMAND\" = ADD ] || exit 0; echo '{{\"code\": 11, \"msg\": \"try later\"}}'; exit 1"
        ),
    )?;
    let daemon = with_plugins(
        &env,
        &[
            serde_json::json!({"type": "first"}),
            serde_json::json!({"type": "second"}),
        ],
    )
    .await?;
    refuses(&daemon, &["second", "try later"]).await?;
    // What the first had done was undone, the last first.
    let calls: String = read(&log)?
        .lines()
        .filter(|l| !l.ends_with("VERSION"))
        .map(|l| format!("{l}\n"))
        .collect();
    assert!(
        calls.starts_with("first ADD\nsecond ADD\nsecond DEL\nfirst DEL"),
        "{calls}"
    );
    Ok(())
}

async fn a_delete_that_fails_is_tried_again(env: Env) -> Result<()> {
    let log = env.root.join("calls");
    let note = format!(
        "echo \"$(basename \"$0\") $CNI_COMMAND\" >>'{}'",
        log.display()
    );
    plugin(
        &env,
        "good",
        &format!("{note}; [ \"$CNI_COMMAND\" = ADD ] && echo '{OK}'; exit 0"),
    )?;
    let broken = env.root.join("broken");
    std::fs::write(&broken, "")?;
    plugin(
        &env,
        "moody",
        &format!(
            "{note}; [ \"$CNI_COMMAND\" = ADD ] && echo '{OK}' && exit 0; [ -e '{}' ] || exit 0; echo '{{\"code\": 99, \"msg\": \"not in the mood\"}}'; exit 1",
            broken.display()
        ),
    )?;
    let daemon = with_plugins(
        &env,
        &[
            serde_json::json!({"type": "good"}),
            serde_json::json!({"type": "moody"}),
        ],
    )
    .await?;
    let pod = daemon.pod(config::own_network).await?;
    let status = pod
        .stop()
        .await
        .expect_err("a DEL that fails is not passed over");
    assert!(status.message().contains("not in the mood"), "{status}");
    assert!(
        read(&log)?.contains("good DEL"),
        "DEL is run for everything even when one step fails: {}",
        read(&log)?
    );
    // Not READY, though: its containers are stopped, and the kubelet asks again.
    std::fs::remove_file(&broken)?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}

/// The kubelet never learns the id of a pod that could not be made, so nobody asks for its removal.
async fn what_a_failed_pod_leaves_is_given_back_later(env: Env) -> Result<()> {
    let (log, broken) = (env.root.join("calls"), env.root.join("broken"));
    std::fs::write(&broken, "")?;
    plugin(
        &env,
        "down",
        &format!(
            "[ ! -e '{0}' ] || [ \"$CNI_COMMAND\" = VERSION ] || {{ echo '{{\"code\": 11, \"msg\": \"the backend is down\"}}'; exit 1; }}; echo $CNI_COMMAND $CNI_CONTAINERID >>'{1}'",
            broken.display(),
            log.display()
        ),
    )?;
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "down"})]).await?;
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    let status = daemon
        .run_pod(config)
        .await
        .map(|p| p.id)
        .expect_err("a pod without a network");
    assert!(status.message().contains("the backend is down"), "{status}");
    std::fs::remove_file(&broken)?;
    // The daemon's word, not the plugin's: only then is its record gone, too.
    eventually("the network to be given back", seconds(20), || async {
        let log = std::fs::read_to_string(daemon.log_file()).unwrap_or_default();
        Ok(log.contains("was given back").then_some(()))
    })
    .await?;
    let calls = read(&log)?;
    assert!(calls.lines().any(|l| l.starts_with("DEL ")), "{calls}");
    Ok(())
}

async fn an_answer_without_an_address(env: Env) -> Result<()> {
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "mean"})]).await?;
    for answer in [
        r#"{"cniVersion": "1.0.0"}"#,
        r#"{"cniVersion": "1.0.0", "interfaces": [{"name": "other", "sandbox": "x"}], "ips": [{"address": "10.9.8.7/24", "interface": 0}]}"#,
    ] {
        plugin(
            &env,
            "mean",
            &format!("[ \"$CNI_COMMAND\" = ADD ] && echo '{answer}'; exit 0"),
        )?;
        refuses(&daemon, &["no address", "fake", "eth0"]).await?;
    }
    Ok(())
}

async fn plugins_get_what_the_specification_says(env: Env) -> Result<()> {
    let dir = env.root.join("seen");
    std::fs::create_dir(&dir)?;
    plugin(
        &env,
        "telling",
        &format!(
            "env | grep ^CNI_ | sort >'{0}/'$CNI_COMMAND.env; cat >'{0}/'$CNI_COMMAND.json; [ \"$CNI_COMMAND\" = ADD ] && echo '{OK}'; exit 0",
            dir.display()
        ),
    )?;
    let capable = serde_json::json!({"type": "telling", "own": {"key": [1, 2]}, "capabilities": {"portMappings": true}});
    let daemon = with_plugins(&env, &[capable]).await?;
    let pod = daemon
        .pod(|c| {
            config::own_network(c);
            c.port_mappings = vec![cri::PortMapping {
                container_port: 80,
                host_port: 8080,
                ..Default::default()
            }];
        })
        .await?;
    let told = pod.status().await?.network.context("network")?.ip;
    assert_eq!(told, "10.9.8.7");
    pod.stop().await?;
    let metadata = pod.config.metadata.clone().unwrap();
    for verb in ["ADD", "DEL"] {
        let text = read(dir.join(format!("{verb}.env")))?;
        for wanted in [
            format!("CNI_CONTAINERID={}", pod.id),
            "CNI_IFNAME=eth0".to_owned(),
            format!("K8S_POD_NAME={}", metadata.name),
            format!("K8S_POD_NAMESPACE={}", metadata.namespace),
            format!("K8S_POD_UID={}", metadata.uid),
            format!("K8S_POD_INFRA_CONTAINER_ID={}", pod.id),
            "IgnoreUnknown=".to_owned(),
            "CNI_NETNS=/".to_owned(),
            "CNI_PATH=".to_owned(),
        ] {
            assert!(text.contains(&wanted), "{verb}: {wanted} is not in {text}");
        }
        let config: serde_json::Value =
            serde_json::from_str(&read(dir.join(format!("{verb}.json")))?)?;
        assert_eq!(config["name"], "fake");
        assert_eq!(config["cniVersion"], "1.0.0");
        assert_eq!(config["own"]["key"], serde_json::json!([1, 2]));
        assert_eq!(
            config["runtimeConfig"]["portMappings"][0]["hostPort"], 8080,
            "{verb}"
        );
        assert_eq!(
            config["prevResult"].is_object(),
            verb == "DEL",
            "{verb}: {config}"
        );
    }
    Ok(())
}

async fn network_ready(daemon: &Daemon) -> Result<(bool, String)> {
    let status = daemon
        .runtime()
        .status(cri::StatusRequest::default())
        .await?
        .into_inner()
        .status
        .context("status")?;
    let condition = status
        .conditions
        .into_iter()
        .find(|c| c.r#type == "NetworkReady")
        .context("NetworkReady")?;
    Ok((
        condition.status,
        format!("{} {}", condition.reason, condition.message),
    ))
}

async fn no_configuration_then_one(env: Env) -> Result<()> {
    let daemon = env.daemon_with(|s| s.cni = None).await?;
    let (ready, words) = network_ready(&daemon).await?;
    assert!(!ready && words.contains("net.d"), "{words}");
    let mut config = config::pod(&daemon);
    config::own_network(&mut config);
    let status = daemon
        .run_pod(config.clone())
        .await
        .map(|p| p.id)
        .expect_err("no network");
    assert!(
        matches!(status.code(), Code::Unavailable | Code::FailedPrecondition),
        "{status}"
    );
    std::fs::write(
        env.root.join("net.d/10-test.conflist"),
        config::conflist(&env),
    )?;
    eventually("NetworkReady", seconds(10), || async {
        Ok(network_ready(&daemon).await?.0.then_some(()))
    })
    .await?;
    daemon.run_pod(config).await?;
    std::fs::remove_file(env.root.join("net.d/10-test.conflist"))?;
    eventually("NetworkReady to be false", seconds(10), || async {
        Ok((!network_ready(&daemon).await?.0).then_some(()))
    })
    .await?;
    // A pod that is there can be taken down all the same: DEL gets the configuration that ADD had.
    daemon.remove_everything().await
}

async fn a_broken_configuration(env: Env) -> Result<()> {
    let daemon = env
        .daemon_with(|s| s.cni = Some("{ not JSON".to_owned()))
        .await?;
    let (ready, words) = network_ready(&daemon).await?;
    assert!(!ready && words.contains("10-test.conflist"), "{words}");
    // The next file in name order is used.
    std::fs::write(
        env.root.join("net.d/20-test.conflist"),
        config::conflist(&env),
    )?;
    eventually("NetworkReady", seconds(10), || async {
        Ok(network_ready(&daemon).await?.0.then_some(()))
    })
    .await
}

async fn host_network_needs_no_plugin(env: Env) -> Result<()> {
    plugin(&env, "failing", "exit 1")?;
    let daemon = with_plugins(&env, &[serde_json::json!({"type": "failing"})]).await?;
    let pod = daemon.pod(|_| {}).await?;
    pod.stop().await?;
    pod.remove().await?;
    Ok(())
}
