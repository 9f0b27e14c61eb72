// The box to try a prompt: streams the answer of the server that serves this page.

import { short } from "./charts.js";

const $ = (id) => document.getElementById(id);

export function startPrompt() {
  let running = null;
  $("form").addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return running.abort();
    running = new AbortController();
    $("send").textContent = "Stop";
    $("send").dataset.running = "";
    $("answer").ariaBusy = "true";
    try {
      await answer(running.signal);
    } catch (error) {
      if (error.name === "AbortError") say(`${$("answer-status").textContent} – stopped`);
      else say(error instanceof TypeError ? "The server does not answer." : error.message);
    }
    running = null;
    $("send").textContent = "Send";
    delete $("send").dataset.running;
    $("answer").ariaBusy = "false";
  });
  $("text").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
}

function say(text) { $("answer-status").textContent = text; }

async function answer(signal) {
  const chat = $("kind").value === "chat", prompt = $("text").value || $("text").placeholder;
  const place = $("answer"), given = document.createElement("span"), text = document.createTextNode("");
  given.className = "given";
  given.textContent = chat ? `${prompt}\n\n` : prompt;
  place.replaceChildren(given, text);
  say("Waiting for the first token");
  const body = {
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
    max_tokens: Number($("tokens").value), temperature: Number($("temperature").value), stream: true, stream_options: { include_usage: true },
  };
  const start = performance.now();
  const response = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await problem(response));
  let first, last, usage, reason;
  for await (const data of events(response.body)) {
    if (data.error) throw new Error(data.error.message ?? "The request failed.");
    const choice = data.choices?.[0], more = chat ? (choice?.delta?.reasoning_content ?? "") + (choice?.delta?.content ?? "") : choice?.text;
    usage = data.usage ?? usage;
    reason = choice?.finish_reason ?? reason;
    if (more) {
      last = performance.now();
      first ??= last;
      const follow = place.scrollHeight - place.scrollTop - place.clientHeight < 24;
      text.data += more;
      if (follow) place.scrollTop = place.scrollHeight;
      say(`First token after ${short(first - start)} ms`);
    }
  }
  const tokens = usage?.completion_tokens, rate = tokens > 1 && last > first ? `, ${short((1000 * (tokens - 1)) / (last - first))} tokens/s` : "";
  const ended = { stop: "ended by itself", length: "reached the number of tokens" }[reason] ?? reason ?? "ended";
  say(`${tokens === undefined ? "" : `${tokens} tokens, `}${first ? `first after ${short(first - start)} ms` : "no text"}${rate}: ${ended}`);
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers ${response.status}.`;
  }
}

// The data of server-sent events, up to [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
