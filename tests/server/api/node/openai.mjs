// npm's openai: a tool called and answered, over chat and over responses, streamed and whole.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const parameters = {
  type: "object",
  properties: { place: { $ref: "#/$defs/Place" } },
  required: ["place"],
  $defs: { Place: { type: "object", properties: { city: { type: "string" } } } },
};
const answers = {};

for (const stream of [false, true]) {
  const ask = async (messages) => {
    const tools = [{ type: "function", function: { name: "weather", parameters } }];
    const body = { model: "toy", messages, tools };
    const whole = stream
      ? await client.chat.completions.stream(body).finalChatCompletion()
      : await client.chat.completions.create(body);
    return whole.choices[0].message;
  };
  const first = { role: "user", content: "Hello" };
  const call = await ask([first]);
  const result = { role: "tool", tool_call_id: call.tool_calls[0].id, content: "rain" };
  answers[`chat ${stream}`] = (await ask([first, call, result])).content;

  const respond = async (body) => {
    const tools = [{ type: "function", name: "weather", parameters, strict: false }];
    const given = { model: "toy", tools, ...body };
    return stream
      ? await client.responses.stream(given).finalResponse()
      : await client.responses.create(given);
  };
  const response = await respond({ input: "Hello" });
  const called = response.output.find((item) => item.type === "function_call");
  const output = { type: "function_call_output", call_id: called.call_id, output: "rain" };
  const second = await respond({ input: [output], previous_response_id: response.id });
  answers[`responses ${stream}`] = second.output_text;
}
console.log(JSON.stringify(answers));
