// Vercel's ai: openai(model), which is /v1/responses, and openai.chat(model), with a tool of Zod.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const openai = createOpenAI({ baseURL: process.argv[2], apiKey: "none" });
const weather = tool({
  description: "The weather somewhere",
  inputSchema: z.object({ place: z.object({ city: z.string() }) }),
  execute: async ({ place }) => `rain in ${place.city}`,
});
const answers = {};
for (const [name, model] of [["responses", openai("toy")], ["chat", openai.chat("toy")]]) {
  const options = { model, tools: { weather }, prompt: "Hello", stopWhen: stepCountIs(3), maxRetries: 0 };
  answers[`${name} whole`] = (await generateText(options)).text;
  answers[`${name} stream`] = await streamText(options).text;
}
console.log(JSON.stringify(answers));
