package certs_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/ztun/ztun/tunnel/certs"
	"github.com/ztun/ztun/tunnel/certs/certstest"
	"github.com/ztun/ztun/tunnel/identity"
)

// Agree says of every pair what the handshake of the pair would.
func TestAgreeIsWhatAHandshakeSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, other := certstest.New(), certstest.New()
		all := map[string]*certs.Certificate{"about to expire": ca.Issue(web)}
		time.Sleep(23 * time.Hour)
		all["web"], all["db"], all["abroad"], all["of another CA"] = ca.Issue(web), ca.Issue(db), ca.Issue(abroad), other.Issue(web)
		ca.Intermediate()
		all["below an intermediate"] = ca.Issue(db)
		ca.Rotate()
		all["after a rotation"] = ca.Issue(web)
		for _, expired := range []bool{false, true} {
			agree := 0
			for cn, client := range all {
				for sn, server := range all {
					_, _, cerr, serr := handshake(client.ClientTLS([]identity.ID{server.ID}), server.ServerTLS())
					err := certs.Agree(client, server)
					if (err == nil) != (cerr == nil && serr == nil) {
						t.Errorf("%s to %s: %v; the handshake: %v, %v", cn, sn, err, cerr, serr)
					}
					if err == nil {
						agree++
					}
				}
			}
			if agree == 0 || agree == len(all)*len(all) {
				t.Errorf("%d of %d pairs agree", agree, len(all)*len(all))
			}
			if !expired {
				time.Sleep(2 * time.Hour)
			}
		}
	})
}
