package marks

import (
	"slices"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"
)

func TestParseSelectors(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		err        string
		// Whether a pod with label a=1 is taken in a plain namespace, one labelled mesh=yes, and there a pod without.
		want [3]bool
	}{
		{name: "empty list", text: "[]"},
		{name: "namespace only", text: "- namespaceSelector: {matchLabels: {mesh: 'yes'}}", want: [3]bool{false, true, true}},
		{name: "pod only", text: "- podSelector: {matchLabels: {a: '1'}}", want: [3]bool{true, true, false}},
		{name: "both halves", text: "- podSelector: {matchLabels: {a: '1'}}\n  namespaceSelector: {matchLabels: {mesh: 'yes'}}", want: [3]bool{false, true, false}},
		{name: "two entries", text: "- podSelector: {matchLabels: {a: '2'}}\n- podSelector: {matchExpressions: [{key: a, operator: DoesNotExist}]}", want: [3]bool{false, false, true}},
		{name: "everything", text: "- {}", want: [3]bool{true, true, true}},
		{name: "json", text: `[{"podSelector":{"matchLabels":{"a":"1"}}}]`, want: [3]bool{true, true, false}},
		{name: "null entry", text: "- null", err: "entry 0"},
		{name: "not a list", text: "podSelector: {}", err: "enablement selectors"},
		{name: "unknown field", text: "- podSelectors: {}", err: "podSelectors"},
		{name: "unknown operator", text: "- {}\n- podSelector: {matchExpressions: [{key: a, operator: Like, values: [b]}]}", err: "entry 1: podSelector"},
		{name: "impossible label", text: "- namespaceSelector: {matchLabels: {'a b': c}}", err: "entry 0: namespaceSelector"},
		{name: "number", text: "- podSelector: {matchLabels: {a: 1}}", want: [3]bool{true, true, false}}, // As kubectl takes it.
		{name: "no YAML", text: "\t- {", err: "enablement selectors"},
		{name: "too long", text: strings.Repeat("#", maxSelectorText+1), err: "more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseSelectors(tt.text)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("error %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil || got == nil {
				t.Fatalf("ParseSelectors = %v, %v", got, err)
			}
			taken := func(pod, namespace map[string]string) bool {
				return slices.ContainsFunc(got, func(s Selector) bool { return s.Matches(pod, namespace) })
			}
			a, mesh := map[string]string{"a": "1"}, map[string]string{"mesh": "yes"}
			if have := [3]bool{taken(a, nil), taken(a, mesh), taken(nil, mesh)}; have != tt.want {
				t.Errorf("selected: %v, want %v", have, tt.want)
			}
		})
	}
	for _, text := range []string{"", " \n"} {
		if got, err := ParseSelectors(text); got != nil || err != nil {
			t.Errorf("ParseSelectors(%q) = %v, %v, want nil: the default", text, got, err)
		}
	}
}

// FuzzParseSelectors: what is taken decides as a plain reading of the labels
// would.
func FuzzParseSelectors(f *testing.F) {
	f.Add("- podSelector: {matchLabels: {a: b}}", "a", "b")
	f.Add("- podSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b, c]}]}\n  namespaceSelector: {matchLabels: {a: b}}", "a", "c")
	f.Add("- {}\n- namespaceSelector: {matchExpressions: [{key: a, operator: Exists}]}", "x", "y")
	f.Add("- podSelector: {matchExpressions: [{key: a, operator: In, values: [b]}, {key: c, operator: DoesNotExist}]}", "a", "b")
	f.Add("- &x {podSelector: {matchLabels: {a: b}}}\n- *x", "a", "b")
	f.Fuzz(func(t *testing.T, text, key, value string) {
		selectors, err := ParseSelectors(text)
		if err != nil || selectors == nil {
			return
		}
		var entries []selectorText
		if err := yaml.Unmarshal([]byte(text), &entries); err != nil || len(entries) != len(selectors) {
			t.Fatalf("%d selectors of %d entries, %v", len(selectors), len(entries), err)
		}
		with, without := map[string]string{key: value}, map[string]string{}
		for i, s := range selectors {
			for _, pod := range []map[string]string{with, without} {
				for _, ns := range []map[string]string{with, without} {
					want := plainMatch(entries[i].PodSelector, pod) && plainMatch(entries[i].NamespaceSelector, ns)
					if got := s.Matches(pod, ns); got != want {
						t.Errorf("entry %d with pod %v in namespace %v: %v, want %v", i, pod, ns, got, want)
					}
				}
			}
		}
	})
}

// plainMatch is what a LabelSelector means, word for word.
func plainMatch(s metav1.LabelSelector, labels map[string]string) bool {
	for k, v := range s.MatchLabels {
		if have, ok := labels[k]; !ok || have != v {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		have, ok := labels[e.Key]
		in := ok && slices.Contains(e.Values, have)
		if want := map[metav1.LabelSelectorOperator]bool{
			metav1.LabelSelectorOpIn: in, metav1.LabelSelectorOpNotIn: !in,
			metav1.LabelSelectorOpExists: ok, metav1.LabelSelectorOpDoesNotExist: !ok,
		}; !want[e.Operator] {
			return false
		}
	}
	return true
}
