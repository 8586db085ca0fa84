//! What clients see of a server: concurrency, sampling, stopping, bounds, cancellation, deadlines.

use std::{
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use futures::future::join_all;
use strata_coordinator::planner::Split;
use strata_proto::{
    DType, Quantization,
    v1::{self, FinishReason, GenerateRequest, Sampling, finished::EndedBy},
};
use tonic::Code;

use crate::{
    cluster::{Answer, Cluster, Options, PATIENCE, ask, client, expectations, greedy, model, status},
    loading::anonymous_bytes,
    processes::Process,
};

fn text_request(prompt: &str, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(prompt.into()),
        max_tokens: Some(max_tokens),
        ..GenerateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_streams_end_with_the_right_tokens_and_free_everything() {
    // A process of its own, so that its memory is nobody else's.
    let demo = model("shakespeare");
    let args = ["serve", demo.to_str().unwrap(), "--workers", "3", "--port", "0", "--dtype", "f32"];
    let server = Process::start(&args, "ready ");
    let client = client(&server.address).await;
    let expected = expectations(&demo);
    let wave = || async {
        let answers = join_all((0..64).map(|i| {
            let e = &expected[i % expected.len()];
            ask(&client, greedy(&e.ids, e.greedy.len() as u32))
        }));
        for (i, answer) in answers.await.into_iter().enumerate() {
            let answer = answer.unwrap();
            assert_eq!(answer.ids, expected[i % expected.len()].greedy);
            assert_eq!(answer.reason, FinishReason::Length as i32);
        }
        let load = status(&server.address).await.load.unwrap();
        assert_eq!((load.running, load.waiting, load.kv_tokens_used), (0, 0, 0));
    };
    wave().await;
    let baseline = anonymous_bytes(server.id());
    for _ in 0..4 {
        wave().await;
    }
    let grown = anonymous_bytes(server.id()).saturating_sub(baseline);
    assert!(grown < 4 << 20, "four more waves left {grown} bytes behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_cache_preempts_and_still_answers_exactly() {
    // 24 blocks for eight sequences that grow to four or five blocks each.
    let options = Options { workers: 2, kv_tokens: Some(24 * 16), prefill_chunk: 7, ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let client = cluster.client().await;
    let expected = expectations(&model("shakespeare"));
    let answers = join_all((0..16).map(|i| ask(&client, greedy(&expected[i % 5].ids, 48)))).await;
    for (i, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.unwrap().ids, expected[i % 5].greedy);
    }
    cluster.wait_idle().await;
    let preemptions = cluster.coordinator.watch().borrow().load.preemptions;
    assert!(preemptions > 0, "the test was meant to preempt");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sampling_depends_on_seed_and_position_alone() {
    let sampled = |seed| GenerateRequest {
        sampling: Some(Sampling {
            temperature: Some(0.9),
            top_k: Some(50),
            top_p: Some(0.95),
            repetition_penalty: Some(1.2),
            presence_penalty: Some(0.3),
            seed: Some(seed),
            ..Sampling::default()
        }),
        logprobs: Some(3),
        ..text_request("ROMEO:\n", 40)
    };
    let one = Cluster::start(&Options::default()).await;
    let alone = ask(&one.client().await, sampled(7)).await.unwrap();
    assert_eq!(alone.seed, 7);
    assert_eq!(alone.logprobs.len(), alone.ids.len());
    assert!(alone.logprobs.iter().all(|l| l.logprob <= 0.0 && l.top.len() == 3));
    assert_ne!(alone.ids, ask(&one.client().await, sampled(8)).await.unwrap().ids);

    let split =
        Options { workers: 3, split: Split::Counts(vec![1, 3, 2]), prefill_chunk: 2, ..Options::default() };
    let three = Cluster::start(&split).await;
    let client = three.client().await;
    let together = join_all((0..12).map(|i| ask(&client, sampled(if i % 2 == 0 { 7 } else { i })))).await;
    for answer in together.into_iter().map(Result::unwrap).filter(|a| a.seed == 7) {
        assert_eq!(answer, alone, "the same request was answered differently in a batch of a split model");
    }
    let drawn = ask(&client, GenerateRequest { sampling: None, ..sampled(0) }).await.unwrap();
    let again = GenerateRequest {
        sampling: Some(Sampling { seed: Some(drawn.seed), ..Sampling::default() }),
        ..sampled(0)
    };
    assert_eq!(ask(&client, again).await.unwrap().ids, drawn.ids);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_end_where_they_should() {
    let cluster = Cluster::start(&Options { workers: 2, ..Options::default() }).await;
    let client = cluster.client().await;
    let whole = ask(&client, text_request("ROMEO:\n", 48)).await.unwrap();
    assert!(whole.text.starts_with("O, then, I'll be so.\n\nROMEO:\nI will not be so"), "{:?}", whole.text);
    assert_eq!(whole.usage, v1::Usage { prompt_tokens: 4, completion_tokens: 48, cached_tokens: 0 });

    let stopped =
        GenerateRequest { stop: vec!["never".into(), "\n\nROM".into()], ..text_request("ROMEO:\n", 48) };
    let stopped = ask(&client, stopped).await.unwrap();
    assert_eq!((stopped.text.as_str(), stopped.reason), ("O, then, I'll be so.", FinishReason::Stop as i32));
    assert!(stopped.ids.len() < 48 && whole.ids.starts_with(&stopped.ids));
    assert_eq!(stopped.ended_by, Some(EndedBy::Stop("\n\nROM".into())));
    // A token is as good; its text is left out.
    let id = whole.ids[9];
    let first = whole.ids.iter().position(|i| *i == id).unwrap();
    let at = GenerateRequest { stop_token_ids: vec![3, id], ..text_request("ROMEO:\n", 48) };
    let stopped = ask(&client, at.clone()).await.unwrap();
    assert_eq!((&stopped.ids[..], stopped.reason), (&whole.ids[..=first], FinishReason::Stop as i32));
    assert_eq!(stopped.ended_by, Some(EndedBy::TokenId(id)));
    assert!(whole.text.starts_with(&stopped.text) && stopped.text.len() < whole.text.len());
    // Not before so many tokens: until then it is not chosen, and stop strings do not count.
    let late = GenerateRequest { min_tokens: 30, stop: vec!["I".into()], ..at };
    let late = ask(&client, late).await.unwrap();
    assert!(late.ids.len() > 30 && !late.ids[..30].contains(&id), "{:?}", late.ids);

    // Any token can be made the end: forbid all but it from position zero on.
    let forced = GenerateRequest {
        sampling: Some(Sampling { logit_bias: [(1, 100.0)].into(), ..Sampling::default() }),
        ..text_request("ROMEO:\n", 48)
    };
    let ended = ask(&client, forced.clone()).await.unwrap();
    assert_eq!((ended.ids, ended.text, ended.reason), (vec![1], String::new(), FinishReason::Eos as i32));
    assert_eq!(ended.ended_by, Some(EndedBy::TokenId(1)));
    let held = ask(&client, GenerateRequest { min_tokens: 3, ..forced.clone() }).await.unwrap();
    assert!(held.ids.len() == 4 && !held.ids[..3].contains(&1) && held.ids[3] == 1, "{:?}", held.ids);
    // A stop string that is a control token appears where the model says that, though the text does not show it.
    let said = GenerateRequest { ignore_eos: true, stop: vec!["<|eos|>".into()], ..forced.clone() };
    let said = ask(&client, said).await.unwrap();
    assert_eq!((said.ids, said.text, said.reason), (vec![1], String::new(), FinishReason::Stop as i32));
    let ignored =
        ask(&client, GenerateRequest { ignore_eos: true, max_tokens: Some(3), ..forced }).await.unwrap();
    assert_eq!((ignored.ids, ignored.reason), (vec![1, 1, 1], FinishReason::Length as i32));

    let rest = GenerateRequest { max_tokens: None, ..greedy(&[0, 842, 28, 201], 1) };
    let rest = ask(&client, rest).await.unwrap();
    assert_eq!(rest.ids.len(), 252, "unset max_tokens means the rest of the context");
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_name_the_field_and_the_bound_and_disturb_nobody() {
    let cluster = Cluster::start(&Options { workers: 2, ..Options::default() }).await;
    let client = cluster.client().await;
    let expected = &expectations(&model("shakespeare"))[0];
    let neighbour = tokio::spawn({
        let (client, request) = (client.clone(), greedy(&expected.ids, 48));
        async move { ask(&client, request).await.unwrap() }
    });
    let sampling = |s: Sampling| GenerateRequest { sampling: Some(s), ..text_request("x", 4) };
    let cases: Vec<(GenerateRequest, &str, &str)> = vec![
        (text_request("x", 0), "max_tokens", "at least 1"),
        (text_request("x", u32::MAX), "max_tokens", "256 tokens"),
        (text_request("x", 255), "max_tokens", "at most 25"),
        (text_request("", 4), "prompt", "at least one character"),
        (GenerateRequest::default(), "prompt", "prompt, token_ids or messages"),
        (GenerateRequest { prompt: Some("x".into()), ..greedy(&[1], 1) }, "prompt", "one of them"),
        (greedy(&vec![5; 256], 1), "prompt", "256 tokens"),
        (text_request(&"word ".repeat(2000), 4), "prompt", "256 tokens"),
        (text_request(&"x".repeat((1 << 20) + 1), 4), "prompt", "1048576"),
        (greedy(&[1, 2, 2048], 1), "token_ids", "less than 2048"),
        (greedy(&[u32::MAX], 1), "token_ids", "less than 2048"),
        (
            sampling(Sampling { temperature: Some(f32::NAN), ..Sampling::default() }),
            "temperature",
            "[0, 100]",
        ),
        (sampling(Sampling { temperature: Some(-0.1), ..Sampling::default() }), "temperature", "[0, 100]"),
        (sampling(Sampling { top_p: Some(0.0), ..Sampling::default() }), "top_p", "(0, 1]"),
        (sampling(Sampling { top_k: Some(u32::MAX), ..Sampling::default() }), "top_k", "2048"),
        (GenerateRequest { logprobs: Some(21), ..text_request("x", 4) }, "logprobs", "20"),
        (GenerateRequest { tenant: "t".repeat(257), ..text_request("x", 4) }, "tenant", "at most 256"),
        (GenerateRequest { stop: vec!["a".into(); 17], ..text_request("x", 4) }, "stop", "16"),
        (GenerateRequest { stop: vec![String::new()], ..text_request("x", 4) }, "stop", "1 to 1024"),
        (GenerateRequest { stop_token_ids: vec![1; 65], ..text_request("x", 4) }, "stop_token_ids", "64"),
        (GenerateRequest { stop_token_ids: vec![2048], ..text_request("x", 4) }, "stop_token_ids", "2048"),
        (GenerateRequest { min_tokens: 5, ..text_request("x", 4) }, "min_tokens", "at most 4"),
        (GenerateRequest { deadline_ms: Some(0), ..text_request("x", 4) }, "deadline_ms", "expected 1"),
    ];
    for (request, field, bound) in cases {
        let status = ask(&client, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        let text = status.message();
        assert!(text.contains(field) && text.contains(bound), "{text:?} names not {field:?} and {bound:?}");
    }
    // As long as may be: 1 MiB is tokenized, found too long, and refused.
    let status = ask(&client, text_request(&"x".repeat(1 << 20), 4)).await.unwrap_err();
    assert!(status.message().starts_with("prompt: "), "{status:?}");
    let wrong = GenerateRequest { model: "other".into(), ..text_request("x", 4) };
    assert_eq!(ask(&client, wrong).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(neighbour.await.unwrap().ids, expected.greedy, "a bad request disturbed its neighbour");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hanging_up_frees_blocks_wherever_the_request_is() {
    let cluster = Cluster::start(&Options { workers: 2, kv_tokens: Some(512), ..Options::default() }).await;
    let client = cluster.client().await;
    for round in 0..40 {
        // Some hang up while waiting, some at the first event, some in the middle.
        let streams = join_all((0..4).map(|_| {
            let mut client = client.clone();
            async move { client.generate(greedy(&[0, 842, 28, 201], 200)).await.unwrap().into_inner() }
        }))
        .await;
        for (i, mut stream) in streams.into_iter().enumerate() {
            for _ in 0..(round * i) % 9 {
                stream.message().await.unwrap();
            }
        }
    }
    cluster.wait_idle().await;
    let answer = ask(&client, greedy(&[0, 842, 28, 201], 8)).await.unwrap();
    assert_eq!(answer.ids.len(), 8);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadlines_end_answers_and_overload_is_an_answer() {
    let hook: strata_worker::StepHook = std::sync::Arc::new(|_| {
        // Slow enough that a deadline falls into the answer.
        std::thread::sleep(Duration::from_millis(10));
        Ok(())
    });
    let cluster = Cluster::start(&Options { max_requests: 2, hook: Some(hook), ..Options::default() }).await;
    let client = cluster.client().await;
    let late = GenerateRequest { deadline_ms: Some(1000), ..greedy(&[0, 842], 250) };
    let mut first = client.clone().generate(late.clone()).await.unwrap().into_inner();
    let mut second = client.clone().generate(late).await.unwrap().into_inner();
    let third = ask(&client, greedy(&[0, 842], 1)).await.unwrap_err();
    assert_eq!(third.code(), Code::ResourceExhausted);
    assert!(third.metadata().contains_key("retry-after-ms"), "{third:?}");
    let tokenize = client.clone().tokenize(v1::TokenizeRequest::default()).await.unwrap_err();
    assert_eq!(
        tokenize.code(),
        Code::ResourceExhausted,
        "everything that costs something goes through the gate"
    );
    for stream in [&mut first, &mut second] {
        let status = loop {
            match stream.message().await {
                Ok(event) => assert!(event.is_some(), "an answer ended without a word"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    }
    cluster.wait_idle().await;
    // The client's own gRPC timeout counts as a deadline too.
    let mut request = tonic::Request::new(greedy(&[0, 842], 250));
    request.metadata_mut().insert("grpc-timeout", "150m".parse().unwrap());
    let mut stream = client.clone().generate(request).await.unwrap().into_inner();
    while let Ok(Some(_)) = stream.message().await {}
    cluster.wait_idle().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn text_and_ids_convert_as_prompts_do() {
    let cluster = Cluster::start(&Options::default()).await;
    let mut client = cluster.client().await;
    let tokenize = |text: &str, plain| v1::TokenizeRequest { text: text.into(), plain, model: String::new() };
    let ids = client.tokenize(tokenize("ROMEO:\n", false)).await.unwrap().into_inner().token_ids;
    assert_eq!(ids, [0, 842, 28, 201]);
    let plain = client.tokenize(tokenize("<|eos|>", true)).await.unwrap().into_inner().token_ids;
    assert!(!plain.contains(&1), "text became a control token: {plain:?}");
    let detokenize = |ids: &[u32], keep_special| v1::DetokenizeRequest {
        token_ids: ids.to_vec(),
        keep_special,
        model: String::new(),
    };
    let text = |client: &mut v1::inference_client::InferenceClient<_>, request| {
        let mut client = client.clone();
        async move { client.detokenize(request).await.map(|r| r.into_inner().text) }
    };
    assert_eq!(text(&mut client, detokenize(&ids, false)).await.unwrap(), "ROMEO:\n");
    assert_eq!(text(&mut client, detokenize(&ids, true)).await.unwrap(), "<|bos|>ROMEO:\n");
    let status = text(&mut client, detokenize(&[2048], false)).await.unwrap_err();
    assert!(
        status.code() == Code::InvalidArgument && status.message().contains("less than 2048"),
        "{status:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plans_can_be_previewed_for_other_policies_and_for_machines_one_does_not_have() {
    let cluster = Cluster::start(&Options { workers: 3, ..Options::default() }).await;
    let channel = tonic::transport::Channel::from_shared(cluster.address.clone()).unwrap().connect_lazy();
    let client = v1::cluster_client::ClusterClient::new(channel);
    let preview = |request| {
        let mut client = client.clone();
        async move { client.preview_plan(request).await.map(|r| r.into_inner().plan.unwrap()) }
    };
    let base = v1::PreviewPlanRequest::default();
    assert_eq!(preview(base.clone()).await.unwrap().replicas[0].stages.len(), 3, "as served");
    let auto = v1::PreviewPlanRequest { split: "auto".into(), dtype: "bf16".into(), ..base.clone() };
    let auto = preview(auto).await.unwrap();
    assert_eq!((auto.replicas[0].stages.len(), auto.dtype.as_str()), (1, "bf16"));
    let quantized = |name: &str| v1::PreviewPlanRequest { quantization: name.into(), ..base.clone() };
    let weights = |plan: &v1::Plan| plan.replicas[0].stages.iter().map(|s| s.weight_bytes).sum::<u64>();
    let int4 = preview(quantized("int4")).await.unwrap();
    let plain = preview(quantized("none")).await.unwrap();
    assert_eq!((int4.quantization.as_str(), plain.quantization.as_str()), ("int4", ""));
    assert!(weights(&int4) * 4 < weights(&plain), "f32 has more than four times as many bits");
    let gpu = v1::Device {
        id: "cuda:4".into(),
        kind: v1::DeviceKind::Cuda as i32,
        budget_bytes: 1 << 30,
        bytes_per_second: 1e12,
        flops_per_second: 1e14,
        ..v1::Device::default()
    };
    let imagined = v1::PreviewPlanRequest { devices: vec![gpu.clone()], ..base.clone() };
    assert_eq!(preview(imagined).await.unwrap().hf_device_map["lm_head"], "4");
    let bad = [
        (v1::PreviewPlanRequest { split: "sideways".into(), ..base.clone() }, "split: unknown split"),
        (v1::PreviewPlanRequest { dtype: "f8".into(), ..base.clone() }, "dtype: unknown dtype"),
        (quantized("int3"), "quantization: "),
        (v1::PreviewPlanRequest { split: "4,4".into(), ..base.clone() }, "places 8 layers"),
        (
            v1::PreviewPlanRequest {
                devices: vec![v1::Device { bytes_per_second: f64::NAN, ..gpu }],
                ..base
            },
            "bytes_per_second NaN",
        ),
    ];
    for (request, says) in bad {
        let status = preview(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(says), "{status:?} does not say {says:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chats_are_rendered_with_the_models_own_template() {
    let cluster = Cluster::start(&Options { workers: 2, ..Options::default() }).await;
    let client = cluster.client().await;
    let chat = |content: &str| GenerateRequest {
        messages: vec![v1::ChatMessage { role: "user".into(), content: content.into() }],
        max_tokens: Some(4),
        ..GenerateRequest::default()
    };
    let text = std::fs::read_to_string(model("shakespeare").join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let answer = ask(&client, chat("What say you, good sir?")).await.unwrap();
    assert_eq!(serde_json::json!(answer.prompt_ids), expected["chat"]["ids"]);
    let both = GenerateRequest { prompt: Some("x".into()), ..chat("x") };
    let status = ask(&client, both).await.unwrap_err();
    assert!(status.message().starts_with("messages: given together"), "{status:?}");
    let long = ask(&client, chat(&"x".repeat((1 << 20) + 1))).await.unwrap_err();
    assert!(long.code() == Code::InvalidArgument && long.message().contains("1048576"), "{long:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fewer_bits_answer_the_same_for_every_number_of_workers_and_threads() {
    let formats = [
        (DType::BF16, None),
        (DType::F16, None),
        (DType::F32, Some(Quantization::Int8)),
        (DType::BF16, Some(Quantization::Int4)),
    ];
    for (dtype, quantization) in formats {
        let mut first: Option<Answer> = None;
        for (workers, threads, prefill_chunk) in [(1, 1, 256), (2, 2, 3), (6, 1, 16)] {
            let dtype = Some(dtype);
            let way = format!("{dtype:?} {quantization:?} over {workers} workers of {threads} threads");
            let options =
                Options { workers, threads, prefill_chunk, dtype, quantization, ..Options::default() };
            let cluster = Cluster::start(&options).await;
            let plan = status(&cluster.address).await.plan.unwrap();
            assert_eq!(plan.quantization, quantization.map_or("", Quantization::name));
            let sampling = Some(Sampling { seed: Some(1), ..Sampling::default() });
            let request =
                GenerateRequest { sampling, logprobs: Some(5), ..text_request("JULIET:\nO Romeo", 40) };
            let answer = ask(&cluster.client().await, request).await.unwrap();
            let same = *first.get_or_insert(answer.clone()) == answer;
            assert!(same, "{way}: another answer, or other log-probabilities");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prefix_that_is_known_is_not_computed_again_and_changes_no_bit() {
    let ids: Vec<u32> = (0..100).map(|i| 50 + i * 7 % 400).collect();
    let request = |ids: &[u32], tenant: &str| GenerateRequest {
        // Penalties need the tokens that no row brings.
        sampling: Some(Sampling {
            temperature: Some(0.8),
            repetition_penalty: Some(1.3),
            frequency_penalty: Some(0.2),
            seed: Some(5),
            ..Sampling::default()
        }),
        logprobs: Some(4),
        ignore_eos: true,
        tenant: tenant.into(),
        ..greedy(ids, 30)
    };
    let but_usage = |answer: &Answer| Answer { usage: v1::Usage::default(), ..answer.clone() };
    let never = Cluster::start(&Options { prefix_cache: false, ..Options::default() }).await;
    let client = never.client().await;
    let cold = ask(&client, request(&ids, "a")).await.unwrap();
    let longer: Vec<u32> = ids.iter().chain(&cold.ids).copied().chain([60, 61]).collect();
    let cold_longer = ask(&client, request(&longer, "a")).await.unwrap();
    assert_eq!((cold.usage.cached_tokens, cold_longer.usage.cached_tokens), (0, 0), "it is switched off");
    for workers in [1, 3] {
        let computed = Arc::new(Mutex::new(0));
        let seen = computed.clone();
        let hook = move |meta: &v1::StepMeta| {
            *seen.lock().unwrap() += meta.token_ids.len();
            Ok(())
        };
        let options = Options { workers, hook: Some(Arc::new(hook)), ..Options::default() };
        let cluster = Cluster::start(&options).await;
        let client = cluster.client().await;
        // All but one of 100, the last of which is computed always, in whole blocks; 129 of which 128 are known.
        for (ids, tenant, expected, known) in [
            (&ids, "a", &cold, 0),
            (&ids, "a", &cold, 96),
            (&longer, "a", &cold_longer, 128),
            (&ids, "b", &cold, 0),
        ] {
            *computed.lock().unwrap() = 0;
            let answer = ask(&client, request(ids, tenant)).await.unwrap();
            assert!(but_usage(&answer) == but_usage(expected), "other tokens or log-probabilities");
            assert_eq!(answer.usage.cached_tokens, known);
            let tokens = *computed.lock().unwrap();
            assert_eq!(
                tokens,
                (ids.len() - known as usize + 29) * workers,
                "{known} of {} are known",
                ids.len()
            );
        }
        let load = status(&cluster.address).await.load.unwrap();
        assert_eq!(load.prefix_hits, 96 + 128);
        assert!(load.prefix_queries >= 432, "{load:?}");
    }
}

/// The target is beyond reach here, so that prompts go in the smallest chunks while somebody decodes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_prompt_does_not_keep_those_who_decode_waiting() {
    let largest = Arc::new(Mutex::new(0));
    let (go_on, gate) = mpsc::channel();
    let (seen, gate) = (largest.clone(), Mutex::new(gate));
    let hook = move |meta: &v1::StepMeta| {
        let decodes = |position| meta.rows.iter().any(|r| r.count == 1 && r.start == position);
        if decodes(110) {
            // Until the other request is there.
            gate.lock().unwrap().recv_timeout(PATIENCE).map_err(|e| e.to_string())?;
        }
        if (101..250).any(decodes) {
            let most = meta.rows.iter().map(|r| r.count).max().unwrap_or(0);
            let mut largest = seen.lock().unwrap();
            *largest = most.max(*largest);
        }
        Ok(())
    };
    let inter_token = Duration::from_nanos(1);
    let options = Options { inter_token, hook: Some(Arc::new(hook)), ..Options::default() };
    let cluster = Cluster::start(&options).await;
    let client = cluster.client().await;
    let ids: Vec<u32> = (0..100).map(|i| 50 + i * 7).collect();
    let decoder = ask(&client, greedy(&ids, 150));
    let other = async {
        cluster.wait_for("somebody who decodes", |s| s.load.generated_tokens > 4).await;
        let different: Vec<u32> = ids.iter().rev().copied().collect();
        let mut other = client.clone().generate(greedy(&different, 2)).await.unwrap().into_inner();
        assert!(other.message().await.unwrap().is_some());
        cluster.wait_for("both", |s| s.load.running + s.load.waiting == 2).await;
        go_on.send(()).unwrap();
        while other.message().await.unwrap().is_some() {}
    };
    let (answer, ()) = tokio::join!(decoder, other);
    assert_eq!(answer.unwrap().ids.len(), 150);
    assert_eq!(*largest.lock().unwrap(), 16, "a prompt of 100 tokens came in other pieces");
}
