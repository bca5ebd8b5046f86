package enrol

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// namespaceMatch is what of a namespace the decision about its pods depends on:
// which selectors it matches, those that match every namespace left out, and
// whether it opts out.
func (c *Controller) namespaceMatch(ns *corev1.Namespace) []bool {
	match := []bool{skips(&ns.ObjectMeta)}
	for _, s := range c.cfg.Selectors {
		if matches, every := s.MatchesNamespace(ns.Labels); !every {
			match = append(match, matches)
		}
	}
	return match
}

// excluded says whether no pod of the namespace is in the mesh.
func (c *Controller) excluded(namespace string) bool {
	return slices.Contains(c.cfg.ExcludeNamespaces, namespace)
}
