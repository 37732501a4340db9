// Set-ups to begin with. One is offered where the server has its methods.

export const EXAMPLES = [
  {
    name: "Drafts that pay",
    about: "A text that repeats itself, with and without drafts: the same tokens in fewer passes.",
    needs: ["token-recycling"],
    values: {
      mode: "completion",
      sides: "2",
      b: "token-recycling",
      max: "96",
      prompt:
        "Monday: two loaves of bread, a bottle of milk, six apples.\n" +
        "Tuesday: two loaves of bread, a bottle of milk, six pears.\n" +
        "Wednesday: two loaves of bread, a bottle of milk, six plums.\n" +
        "Thursday:",
    },
  },
  {
    name: "A smaller cache",
    about: "Half of the past is forgotten; watch which half, and what it does to the text.",
    needs: ["keyformer"],
    values: {
      mode: "chat",
      sides: "2",
      b: "keyformer:keep=50%",
      max: "96",
      prompt:
        "A farmer has a goat, a wolf and a cabbage, and a boat that holds him and one of them. " +
        "Left alone, the wolf eats the goat and the goat eats the cabbage. " +
        "How does he bring all of them over the river?",
    },
  },
  {
    name: "Drafts over a smaller cache",
    about: "Two methods that do not know each other in one recipe.",
    needs: ["token-recycling", "keyformer"],
    values: {
      mode: "chat",
      a: "keyformer:keep=50% + token-recycling",
      prompt: "List the planets of the solar system, each with one sentence about it.",
    },
  },
  {
    name: "JSON by a schema",
    about: "Whatever the model would like to say, the text keeps the schema.",
    needs: [],
    values: {
      mode: "chat",
      schema: JSON.stringify(
        {
          type: "object",
          properties: { name: { type: "string" }, population: { type: "integer" } },
          required: ["name", "population"],
          additionalProperties: false,
        },
        null,
        2,
      ),
      prompt: "Name a city in Europe and its population.",
    },
  },
];
