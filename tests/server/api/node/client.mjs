// Clients of node for benchmarks/clients/node_client.py: a line of JSON in, a line of JSON out.
//   node client.mjs openai|ai URL MODEL KEY
import { createInterface } from "node:readline";
import { z } from "zod";

const [library, url, model, key] = process.argv.slice(2);
const weather = z.object({ city: z.string().max(12), warm: z.boolean() });
const HELLO = [{ role: "user", content: "Say hello." }];
const answer = (text, more = {}) => ({ text: text ?? "", ...more });

async function forOpenAI() {
  const { default: OpenAI } = await import("openai");
  const { zodResponseFormat, zodTextFormat } = await import("openai/helpers/zod");
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
  // This client has no extra_body: what a body holds is sent.
  const body = ({ extra_body: extra, ...options }) => ({ model, ...extra, ...options });
  const calls = (list) => (list ?? []).map((c) => [c.function.name, c.function.arguments]);
  const ofChat = (whole) =>
    whole.choices.map((c) =>
      answer(c.message.content, {
        calls: calls(c.message.tool_calls),
        finish: c.finish_reason,
        total_tokens: whole.usage?.total_tokens,
        scores: (c.logprobs?.content ?? []).map((s) => [s.token, s.logprob]),
        id: whole.id,
      }));
  const ofText = (whole) =>
    whole.choices.map((c) => {
      const { tokens = [], token_logprobs: scores = [] } = c.logprobs ?? {};
      return answer(c.text, { finish: c.finish_reason, scores: tokens.map((t, i) => [t, scores[i]]) });
    });
  const ofResponse = (whole) => [
    answer(whole.output_text, {
      calls: whole.output.filter((i) => i.type === "function_call").map((i) => [i.name, i.arguments]),
      finish: whole.status,
      total_tokens: whole.usage?.total_tokens,
      id: whole.id,
    })];
  return {
    models: async () => {
      const names = [];
      for await (const card of client.models.list()) names.push((await client.models.retrieve(card.id)).id);
      return names;
    },
    chat: async (messages, { stream, ...options }) => {
      const given = { messages, ...body(options) };
      if (!stream) return ofChat(await client.chat.completions.create(given));
      return ofChat(await client.chat.completions.stream(given).finalChatCompletion());
    },
    complete: async (prompt, options) => {
      const given = { prompt, ...body(options) };
      if (!options.stream) return ofText(await client.completions.create(given));
      let text = "";
      for await (const chunk of await client.completions.create(given)) text += chunk.choices[0]?.text ?? "";
      return [answer(text)];
    },
    respond: async (input, { stream, ...options }) => {
      const given = { input, ...body(options) };
      if (!stream) return ofResponse(await client.responses.create(given));
      return ofResponse(await client.responses.stream(given).finalResponse());
    },
    structured: async (api) => {
      if (api === "chat") {
        const response_format = zodResponseFormat(weather, "weather");
        const given = { model, messages: HELLO, response_format, max_tokens: 200 };
        return (await client.chat.completions.parse(given)).choices[0].message.parsed;
      }
      const text = { format: zodTextFormat(weather, "weather") };
      return (await client.responses.parse({ model, input: "Hello", text, max_output_tokens: 200 })).output_parsed;
    },
    batch: (questions) =>
      Promise.all(questions.map((content) =>
        client.chat.completions.create({ model, messages: [{ role: "user", content }], max_tokens: 4 }))),
    leave: async () => {
      const given = { model, messages: HELLO, max_tokens: 200, stream: true };
      const opened = await client.chat.completions.create(given);
      for await (const _ of opened) break;
      opened.controller.abort();
    },
  };
}

async function forAI() {
  const { createOpenAI } = await import("@ai-sdk/openai");
  const { Output, generateText, jsonSchema, stepCountIs, streamText, tool } = await import("ai");
  const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
  const kinds = { chat: openai.chat, complete: openai.completion, respond: openai.responses, responses: openai.responses };
  const schema = (form) => Output.object({ schema: jsonSchema(form) });

  // OpenAI's options by the names that this library has for them.
  const named = (options) => {
    const own = Object.entries({
      logitBias: options.logit_bias,
      logprobs: options.top_logprobs ?? options.logprobs,
      echo: options.echo,
      previousResponseId: options.previous_response_id,
      store: options.store,
    }).filter(([, value]) => value !== undefined);
    const tools = Object.fromEntries((options.tools ?? []).map((given) => {
      const { name, description, parameters, strict } = given.function ?? given;
      return [name, tool({ description, inputSchema: jsonSchema(parameters), strict })];
    }));
    const choice = options.tool_choice;
    const form = options.response_format?.json_schema?.schema ?? options.text?.format?.schema;
    return {
      maxRetries: 0,
      maxOutputTokens: options.max_tokens ?? options.max_output_tokens,
      temperature: options.temperature,
      topP: options.top_p,
      seed: options.seed,
      stopSequences: options.stop,
      frequencyPenalty: options.frequency_penalty,
      ...(options.tools && { tools }),
      ...(choice && { toolChoice: typeof choice === "string" ? choice : { type: "tool", toolName: "weather" } }),
      ...(form && { output: schema(form) }),
      providerOptions: { openai: Object.fromEntries(own) },
    };
  };
  const spoken = (messages) =>
    messages.map(({ role, content, tool_calls: made, tool_call_id: id }) => {
      if (role === "tool")
        return { role, content: [{ type: "tool-result", toolCallId: id, toolName: "weather", output: { type: "text", value: content } }] };
      if (made)
        return { role, content: made.map((c) => ({ type: "tool-call", toolCallId: c.id, toolName: c.function.name, input: JSON.parse(c.function.arguments) })) };
      return { role, content };
    });
  const ask = async (kind, given, options) => {
    const text = typeof given === "string" ? { prompt: given } : { messages: spoken(given) };
    const all = { model: kinds[kind](options.model ?? model), ...text, ...named(options) };
    let failure;
    const whole = options.stream
      ? streamText({ ...all, onError: ({ error }) => (failure = error) })
      : await generateText(all);
    if (options.stream) await whole.consumeStream();
    if (failure) throw failure;
    const [said, used, made, usage, finish, response, metadata] = await Promise.all([
      whole.text, named(options), whole.toolCalls, whole.usage, whole.finishReason, whole.response, whole.providerMetadata]);
    const { tokens, token_logprobs: listed, ...rest } = metadata?.openai?.logprobs ?? {};
    const scores = tokens ? tokens.map((t, i) => [t, listed[i]]) : Object.values(rest).map((s) => [s.token, s.logprob]);
    return [answer(said, {
      calls: made.map((c) => [c.toolName, JSON.stringify(c.input)]),
      finish, total_tokens: usage.totalTokens, scores, id: response.id,
    })];
  };
  return {
    chat: (given, options) => ask("chat", given, options),
    complete: (given, options) => ask("complete", given, options),
    respond: (given, options) => ask("respond", given, options),
    structured: async (api) => {
      const options = { model: kinds[api](model), output: Output.object({ schema: weather }), maxRetries: 0 };
      return (await generateText({ ...options, prompt: "Hello", maxOutputTokens: 200 })).output;
    },
    batch: (questions) =>
      Promise.all(questions.map((prompt) =>
        generateText({ model: openai.chat(model), prompt, maxOutputTokens: 4, maxRetries: 0 }))),
    leave: async () => {
      const control = new AbortController();
      const options = { model: openai.chat(model), messages: HELLO, maxOutputTokens: 200 };
      const opened = streamText({ ...options, abortSignal: control.signal, onError: () => {} });
      for await (const _ of opened.textStream) break;
      control.abort();
    },
    agent: async (api, { stream }) => {
      const tools = { weather: tool({ description: "Weather", inputSchema: weather, strict: true, execute: ({ city }) => `rain in ${city}` }) };
      const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
      // Small models end in a form alone, and call again and again where they may.
      const own = { output: Output.object({ schema: weather }), providerOptions: { openai: { parallelToolCalls: false } } };
      const options = { model: kinds[api](model), tools, prepareStep, stopWhen: stepCountIs(2), maxRetries: 0, ...own };
      const given = { ...options, prompt: "Hello", maxOutputTokens: 200, temperature: 0 };
      return stream ? await streamText(given).text : (await generateText(given)).text;
    },
  };
}

const client = await { openai: forOpenAI, ai: forAI }[library]();
const status = (error) => error?.statusCode ?? error?.status ?? (error?.cause && status(error.cause));
const act = async (line) => {
  const { action, given, options } = JSON.parse(line);
  try {
    return { value: (await client[action](given, options)) ?? null };
  } catch (error) {
    return { error: `${error?.name}: ${error?.message} ${error?.responseBody ?? ""}`, status: status(error) };
  }
};
for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(await act(line)));
