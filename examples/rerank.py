"""Rank a few passages for a question with the embedded LLM."""

from routehead_plugins import Document, HeadRoutedAttentionReranker


def main() -> None:
    """Load the LLM, rank three passages and print their scores."""
    reranker = HeadRoutedAttentionReranker.from_pretrained("embedded")
    passages = [
        Document(
            "The Eiffel Tower was finished in 1889, in time for the World's Fair.", id="tower"
        ),
        Document("Bread rises because yeast gives off gas while it eats sugar.", id="bread"),
        Document("Steel rusts when water and air reach it; paint keeps both away.", id="steel"),
    ]
    ranking = reranker.rerank("What makes bread rise?", passages)
    for hit in ranking:
        print(f"{hit.score:+.4f}  {hit.document.id:6}  {hit.document.text}")
    print(f"{len(ranking.heads)} heads were read")


if __name__ == "__main__":
    main()
