package main

import (
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// authority is the control plane's own, as its state directory has it.
func (n *node) authority() (*x509.Certificate, crypto.Signer) {
	n.Helper()
	files, err := filepath.Glob(filepath.Join(n.dir, "control", "*"))
	if err != nil {
		n.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		var list []struct{ Certificate, Key string }
		if err != nil || json.Unmarshal(text, &list) != nil || len(list) != 1 {
			continue
		}
		cert, _ := pem.Decode([]byte(list[0].Certificate))
		key, _ := pem.Decode([]byte(list[0].Key))
		if cert == nil || key == nil {
			continue
		}
		parsed, err := x509.ParseCertificate(cert.Bytes)
		if err != nil {
			n.Fatal(err)
		}
		signer, err := x509.ParsePKCS8PrivateKey(key.Bytes)
		if err != nil {
			n.Fatal(err)
		}
		return parsed, signer.(crypto.Signer)
	}
	n.Fatalf("no authority in %q", files)
	return nil, nil
}

// serial is the serial number of the account's latest certificate, by the log.
func (n *node) serial(account string) *big.Int {
	n.Helper()
	all := regexp.MustCompile(`identity=spiffe://\S*/sa/`+account+` .*serial="(\d+)"`).FindAllStringSubmatch(n.log.String(), -1)
	if len(all) == 0 {
		n.Fatalf("no certificate of %s in the log", account)
	}
	serial, _ := new(big.Int).SetString(all[len(all)-1][1], 10)
	return serial
}

// revoke replaces the list at path.
func (n *node) revoke(path string, number int64, serials ...*big.Int) {
	n.Helper()
	cert, key := n.authority()
	list := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, cert, key)
	if err == nil {
		err = os.WriteFile(path+".new", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}), 0o600)
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		n.Fatal(err)
	}
}

// TestRevokedPeerIsCut: a list that comes while the proxy runs ends the
// connection to a peer on it, and a later one lets the peer be met again.
func TestRevokedPeerIsCut(t *testing.T) {
	bothPaths(t, func(t *testing.T, n *node) {
		path := filepath.Join(n.dir, "ca-crl.pem")
		n.startProxy("CRL_PATH=" + path)
		eventually(t, "both certificates are there", func() bool { return strings.Count(n.log.String(), "certificate fetched") == 2 })
		live := n.connect()
		n.wantEcho("before there is a list", live)

		n.revoke(path, 1, n.serial("pb"))
		if _, err := live.Read(make([]byte, 1)); err == nil || err.(net.Error).Timeout() {
			t.Errorf("the live connection: %v, want its end", err)
		}
		eventually(t, "the record says why", func() bool {
			return strings.Contains(n.log.String(), "connection closed since peer cert revoked by CRL")
		})
		if c, err := n.pa.Dial("tcp", "10.1.0.12:8080", patience); err == nil {
			t.Error("a new connection to a revoked peer was made")
			_ = c.Close()
		}
		_, metrics, err := n.http("GET", "15020", "/metrics")
		if err != nil || !regexp.MustCompile(`istio_crl_policy_rejections_total\{reporter="source"\} [1-9]`).MatchString(metrics) {
			t.Errorf("no rejection among the metrics, %v", err)
		}
		if want := fmt.Sprintf("%q:%q", "crlPath", path); !strings.Contains(n.log.String(), want) {
			t.Errorf("the configuration that was logged has no %s", want)
		}

		n.revoke(path, 2)
		eventually(t, "a new connection is made", func() bool {
			c, err := n.pa.Dial("tcp", "10.1.0.12:8080", patience)
			if err != nil {
				return false
			}
			defer c.Close()
			return echo(c, "again") == nil
		})
	})
}
